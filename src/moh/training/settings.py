"""How to train: the settings that recipes of all families share, validated once, at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
        precision: "bf16" (autocast), "fp32", or "auto": bf16 where this machine is faster with it.
        logging_steps: steps between two log entries.
        save_steps: steps between two checkpoints, a multiple of `logging_steps` so that a resumed run logs the same.
        save_total_limit: checkpoints to keep.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        balance_loss_coef: weight beta of the load-balance loss (0.01 in the paper).
        balance_loss_scope: over which tokens of a forward pass heads are balanced: "process", each process's own, or
            "global", those of all processes together.
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
    balance_loss_scope: Literal["process", "global"] = "process"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_length()
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


def at_least(name: str, value: float, low: float) -> None:
    """Check a number of a recipe.

    Raises:
        ValueError: `value` is below `low`; names both.
    """
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
