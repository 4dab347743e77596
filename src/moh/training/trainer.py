"""The transformers Trainer for causal language models, with distillation from a dense teacher.

Not for recipes or data: see `moh.training.run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh.training.distillation import distillation_loss
from moh.training.routing_trainer import RoutingTrainer

require("transformers", extra="llm")

from transformers import PreTrainedModel  # noqa: E402


class MoHTrainer(RoutingTrainer):
    """`transformers.Trainer` for causal language models, MoH or dense.

    With a teacher the loss is `(1 - w) L + w T^2 KL(teacher || student) + balance`: L the next-token loss, w the
    `distillation_weight`, T the temperature, both means over all predicted tokens of the step; the load-balance term
    (`config.router_aux_loss_coef` times the loss) keeps its weight.

    Args:
        args: all arguments of `transformers.Trainer`.
        teacher: the dense original, frozen here; None trains without distillation.
        distillation_weight: w, between 0 and 1.
        distillation_temperature: T, above 0.
        kwargs: all arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        distillation_weight: float = 0.5,
        distillation_temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"distillation_weight must be between 0 and 1, got {distillation_weight}")
        if distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, got {distillation_temperature}")
        self.teacher = teacher
        self.distillation_weight = distillation_weight
        self.distillation_temperature = distillation_temperature
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, mixed with the teacher's while training."""
        with self.recording(model):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if self.teacher is not None and model.training:
            loss = (1 - self.distillation_weight) * loss + self._teacher_loss(
                model, inputs, outputs, num_items_in_batch
            )
        return (loss, outputs) if return_outputs else loss

    def _teacher_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """w times (the distillation loss + the balance term), scaled like the Trainer's loss."""
        assert self.teacher is not None
        labels = inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            without_labels = {key: value for key, value in inputs.items() if key != "labels"}
            teacher_logits = self.teacher(**without_labels, use_cache=False).logits
        loss = distillation_loss(outputs.logits, teacher_logits, labels, temperature=self.distillation_temperature)
        here = (labels[:, 1:] != -100).sum()  # predicted tokens of this call
        coefficient = getattr(self.accelerator.unwrap_model(model).config, "router_aux_loss_coef", 0.0)
        balance = outputs.get("aux_loss")
        if coefficient and balance is not None:
            loss = loss + coefficient * balance * here  # the call's share of the step, as in the model's own loss
        if num_items_in_batch is None:
            return self.distillation_weight * loss / here
        # Every process divides by the tokens of all of them, and DDP averages: hence their number
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.distillation_weight * loss / num_items_in_batch * processes
