"""The transformers Trainer with what it lacks: distillation from a dense teacher, and a log of the routing.

Works for any causal language model; one without MoH layers just has no routing to log. Not for recipes or data: see
`moh.training.run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh.routing import record_routing
from moh.training.distillation import distillation_loss

require("transformers", extra="llm")

from transformers import PreTrainedModel, Trainer  # noqa: E402


class MoHTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for causal language models, MoH or dense.

    With a teacher the loss is `(1 - w) L + w T^2 KL(teacher || student) + balance`: L the next-token loss, w the
    `distillation_weight`, T the temperature, both means over all predicted tokens of the step; the load-balance term
    (`config.router_aux_loss_coef` times the loss) keeps its weight. Where routing happens, the log gets `active_share`, the
    mean share of heads that a token used, and `balance_loss`, of the last batch before each entry.

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
        self._routing_log: dict[str, float] = {}
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
        with self._routing_logged(model):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if self.teacher is not None and model.training:
            loss = (1 - self.distillation_weight) * loss + self._teacher_loss(
                model, inputs, outputs, num_items_in_batch
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the routing beside the training loss."""
        if "loss" in logs:
            logs.update(self._routing_log)
            self._routing_log = {}
        super().log(logs, start_time)

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

    @contextmanager
    def _routing_logged(self, model: nn.Module) -> Iterator[None]:
        """Keep the figures of this forward pass if it belongs to a step that is logged."""
        if not model.training or (self.state.global_step + 1) % max(1, int(self.state.logging_steps)):
            yield
            return
        with record_routing(self.accelerator.unwrap_model(model)) as routing:
            yield
        if len(routing):
            self._routing_log = {
                "active_share": routing.share(),
                "balance_loss": float(routing.balance_loss().detach()),
            }
