"""Recipes as YAML files with overrides from the command line; `task` names the family, whose dataclasses define the fields."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moh._checks import at_least
from moh._extras import require
from moh.models.heads import requested_share
from moh.training.parsing import build, merge, override, read_file, split_options
from moh.training.shipped import find_recipe

TASKS = {
    "language": ("moh.training.language.recipe", "Recipe"),
    "image_classification": ("moh.training.images.recipe", "ImageRecipe"),
    "diffusion": ("moh.training.diffusion.recipe", "DiffusionRecipe"),
}
"""task -> (module, dataclass) of its recipes. A recipe without `task` is a language model's."""


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Read a recipe from a YAML file and apply overrides.

    Args:
        path: the YAML file, or the name of a recipe of this package such as "llm/tiny_75" (`moh train --list`); None if the
            overrides give everything.
        overrides: as on a command line: `["--training.max_steps", "10", "--conversion", "null"]`; `--config FILE` takes
            over the fields of another file.

    Returns:
        the recipe, of its task's class (`TASKS`).

    Raises:
        FileNotFoundError: no such file, and no such recipe in this package.
        ValueError: an unknown, missing or wrong field; one line that names it.
    """
    data = {} if path is None else read_file(find_recipe(path))
    try:
        options: list[tuple[str, Any]] = [
            (name, read_file(find_recipe(value)) if name == "config" else value)
            for name, value in split_options(overrides)
        ]
        kind = recipe_class(data, options)
        for name, value in options:
            data = merge(kind, data, value) if name == "config" else override(kind, data, name, value)
        return build(kind, data)
    except (ValueError, RecursionError) as error:  # YAML can describe a list that holds itself
        raise ValueError(f"{path or 'recipe'}: {error}") from None


def dump_recipe(recipe: Any) -> str:
    """The recipe as YAML that `load_recipe` reads."""
    yaml = require("yaml", extra="train")
    return str(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))


def recipe_class(data: Mapping[str, Any], options: Sequence[tuple[str, Any]]) -> Any:
    """The class of the last task that file and options name; a language model's by default."""
    task = data.get("task", "language")
    for name, value in options:
        task = value.get("task", task) if name == "config" else value if name == "task" else task
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    module, name = TASKS[task]
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; named as in `transformers.TrainingArguments` where it has the same setting.

    Args:
        output_dir: checkpoints, TensorBoard logs and, in model/, the result; an interrupted run resumes from here.
        max_steps: optimiser steps.
        learning_rate: peak, after the warm-up.
        warmup_steps: steps of linear warm-up; below 1, a share of `max_steps`.
        lr_scheduler_type: "cosine", "linear", "constant_with_warmup" and so on.
        weight_decay: AdamW's.
        per_device_train_batch_size: samples per process and forward pass.
        gradient_accumulation_steps: forward passes per optimiser step.
        seed: for the order of the data, augmentation and dropout.
        precision: "bf16" (autocast), "fp16" (autocast and a gradient scaler; GPUs only), "fp32", "tf32" (float32, whose matrix
            products use TF32 on NVIDIA GPUs that have it), or "auto": bf16 where this machine is faster with it, else fp32.
        logging_steps: steps between two log entries; the last step always has one.
        save_steps: steps between two checkpoints, a multiple of `logging_steps` so that a resumed run logs the same.
        save_total_limit: checkpoints to keep.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        balance_loss_coef: weight beta of the load-balance loss (0.01 in the paper).
        balance_loss_scope: over which tokens of a forward pass heads are balanced: "process", each process's own, or
            "global", those of all processes together.
        extra: further arguments of `transformers.TrainingArguments`, by name.
    """

    output_dir: str
    max_steps: int
    learning_rate: float = 1e-4
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    logging_steps: int = 1
    save_steps: int = 50
    save_total_limit: int = 2
    gradient_checkpointing: bool = False
    balance_loss_coef: float = 0.0
    balance_loss_scope: Literal["process", "global"] = "process"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_length()
        if "hub_token" in self.extra:
            raise ValueError(
                "training.extra must not set hub_token, which would be written to recipe.yaml: log in with `hf auth login`, "
                "or set HF_TOKEN"
            )
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("logging_steps", "save_steps", "save_total_limit"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "warmup_steps", "weight_decay", "balance_loss_coef"):
            at_least(f"training.{name}", getattr(self, name), 0)
        if self.balance_loss_scope not in ("process", "global"):
            raise ValueError(
                f'training.balance_loss_scope must be "process" or "global", got {self.balance_loss_scope!r}'
            )
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"training.save_steps must be a multiple of training.logging_steps = {self.logging_steps}, "
                f"got {self.save_steps}"
            )

    def _check_length(self) -> None:
        """Check how long to train; families that count in epochs override it."""
        at_least("training.max_steps", self.max_steps, 1)


@dataclass(frozen=True)
class ImageTrainingSettings(TrainingSettings):
    """How to train a model that reads or draws images: `TrainingSettings` plus the following.

    Args:
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        ema_decay: decay of the moving average of the weights, which is then evaluated, saved and used to draw images.
        ema_warmup: use a smaller decay in the first steps, so that the average keeps up in a short run.
        workers: processes that load images, per training process; 0 loads them in it. A run may resume with a different
            number: the data does not depend on it.
    """

    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    ema_warmup: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_grad_norm", "workers"):
            at_least(f"training.{name}", getattr(self, name), 0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"training.ema_decay must be at least 0 and below 1, got {self.ema_decay}")


@dataclass(frozen=True)
class ConversionSettings:
    """How a dense model becomes a MoH model before training: the arguments of `moh.convert`, with their own defaults.

    Args:
        share: share of all heads that tokens use; null means 0.75, unless `active_heads` is given.
        shared_heads: heads per layer that every token uses, instead of `share`; null means what `moh.convert` chooses.
        active_heads: routed heads per layer that each token chooses, instead of `share`.
        router: "linear" (the default here: fitted to the heads' contributions), "threshold" (the same, with as many heads as
            a token needs; the default of `moh.convert` for language models), "query_norm" or "query_norm_rounded" (the
            paper's, without parameters), "two_stage" or "single_stage" (learned).
        allocation: "even" gives every layer the same number of heads, "sensitivity" more to the layers that need them.
        refit_output: refit the output projections so that the active heads make up for the others.
    """

    share: float | None = None
    shared_heads: int | None = None
    active_heads: int | None = None
    router: str = "linear"
    allocation: Literal["even", "sensitivity"] = "even"
    refit_output: bool = False

    def __post_init__(self) -> None:
        try:
            requested_share(self.share, shared_heads=self.shared_heads, active_heads=self.active_heads)
        except ValueError as error:
            raise ValueError(f"conversion.{error}") from None
