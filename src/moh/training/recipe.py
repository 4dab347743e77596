"""A training run as data: frozen dataclasses read from a YAML file, with overrides from the command line.

Every field is validated once, at construction. Not for running anything: `moh.training.train` does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moh._extras import require
from moh.training.corpus import CORPORA, DEFAULT_CORPUS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class ModelRecipe:
    """The pretrained model to start from.

    Args:
        path: a local directory, a name on the model hub, or a .gguf file (which holds weights and tokenizer).
    """

    path: str


@dataclass(frozen=True)
class ConversionRecipe:
    """How the dense model becomes a MoH model before training: the arguments of `moh.convert`.

    Args:
        shared_heads: heads per layer that every token uses.
        active_heads: routed heads per layer that each token chooses.
        router: "linear" (fitted to the heads' contributions), "query_norm" (the paper's, without parameters) or
            "two_stage" (the paper's learned one).
        calibration_tokens: tokens of the training text that the conversion looks at; "query_norm" needs none.
        allocation: "even" gives every layer the same number of heads, "sensitivity" more to the layers that need them.
        refit_output: refit the output projections so that the active heads make up for the others.
    """

    shared_heads: int
    active_heads: int
    router: str = "linear"
    calibration_tokens: int = 12_288
    allocation: Literal["even", "sensitivity"] = "even"
    refit_output: bool = False


@dataclass(frozen=True)
class DataRecipe:
    """The text to train on, and its held-out part.

    Args:
        corpus: a built-in corpus (`moh.training.corpus.CORPORA`); not used if `files` are given.
        files: your own text files or directories (.txt, .md, .html, UTF-8).
        heldout_files: text files to hold out; without them a fixed tenth of `files` is held out.
        seq_len: tokens per training sequence.
        cache_dir: where fetched corpora are kept (default ~/.cache/moh).
    """

    corpus: str = DEFAULT_CORPUS
    files: list[str] = field(default_factory=list)
    heldout_files: list[str] = field(default_factory=list)
    seq_len: int = 512
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ValueError(f"data.corpus must be one of {', '.join(CORPORA)}, got {self.corpus!r}")
        if self.heldout_files and not self.files:
            raise ValueError("data.heldout_files needs data.files: a built-in corpus has its own held-out part")
        _at_least("data.seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class TrainingRecipe:
    """How to train; the names are those of `transformers.TrainingArguments` where it has the same.

    Args:
        output_dir: checkpoints, TensorBoard logs and, in model/, the result; an interrupted run resumes from here.
        max_steps: optimiser steps.
        learning_rate: its peak, after the warm-up.
        warmup_steps: steps of linear warm-up; below 1, a share of `max_steps`.
        lr_scheduler_type: "cosine", "linear", "constant_with_warmup" and so on.
        weight_decay: of AdamW.
        per_device_train_batch_size: sequences per process and forward pass.
        gradient_accumulation_steps: forward passes per optimiser step.
        seed: of the order of the data and of dropout.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 where this machine is faster with it.
        logging_steps: steps between two entries of the loss.
        save_steps: steps between two checkpoints, a multiple of `logging_steps` so that a resumed run logs the same.
        save_total_limit: checkpoints to keep.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        balance_loss_coef: weight beta of the load-balance loss (0.01 in the paper).
        distillation_weight: w in (1 - w) next-token loss + w T^2 KL(dense original || model).
        distillation_temperature: T of the distillation.
        extra: more arguments of `transformers.TrainingArguments`, by name.
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
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    logging_steps: int = 1
    save_steps: int = 50
    save_total_limit: int = 2
    gradient_checkpointing: bool = False
    balance_loss_coef: float = 0.0
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("logging_steps", "save_steps", "save_total_limit"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "warmup_steps", "weight_decay", "balance_loss_coef"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"training.save_steps must be a multiple of training.logging_steps = {self.logging_steps}, "
                f"got {self.save_steps}"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"training.distillation_weight must be between 0 and 1, got {self.distillation_weight}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"training.distillation_temperature must be above 0, got {self.distillation_temperature}")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        model: the pretrained model to start from.
        training: how to train.
        data: the text.
        conversion: how to make a MoH model of it first; null trains the model as it is (the dense control).
    """

    model: ModelRecipe
    training: TrainingRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    conversion: ConversionRecipe | None = None

    def __post_init__(self) -> None:
        if self.conversion is not None:  # here, because the parser hides what an optional part raises
            _at_least("conversion.calibration_tokens", self.conversion.calibration_tokens, 1)


def recipe_parser(prog: str | None = None) -> ArgumentParser:
    """The parser of recipes: `--config FILE` and one option for every field, such as `--training.max_steps 10`."""
    jsonargparse = require("jsonargparse", extra="llm")
    parser: ArgumentParser = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Options override the recipe in the YAML file.",
    )
    parser.add_argument("--config", action="config", help="YAML file with a recipe; may be given more than once")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and apply overrides.

    Args:
        path: the YAML file; None if the overrides say everything.
        overrides: as on a command line: `["--training.max_steps", "10", "--conversion", "null"]`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown, missing or wrong field; one line that names it.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"no such recipe: {path}")
    jsonargparse = require("jsonargparse", extra="llm")
    parser = recipe_parser()
    arguments = ([] if path is None else ["--config", str(path)]) + list(overrides)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        return Recipe(**{f.name: parsed[f.name] for f in dataclasses.fields(Recipe)})
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{path or 'recipe'}: {_one_line(str(error))}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads."""
    yaml = require("yaml", extra="llm")
    return str(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))


def _at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _one_line(text: str) -> str:
    """The parser's message, without its account of every alternative that an optional part could have been."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "- Problem with",
        "- Expected a <class 'NoneType'>",
        "Given value",
    )
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(" ".join(line for line in lines if not line.startswith(noise)).split())
