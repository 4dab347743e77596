"""The transformers Trainer with a log of the routing, for models of any family.

A model without MoH layers just has no routing to log. What is trained on what is the business of the subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moh._extras import require
from moh.routing import RoutingRecord, record_routing
from moh.training.checkpoints import writing_checkpoint

require("transformers", extra="llm")

from transformers import Trainer  # noqa: E402


class RoutingTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` whose log has `active_share`, the mean share of heads that a token used, and `balance_loss`.

    Both are those of the last batch before each entry, where routing happens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routing_log: dict[str, float] = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the routing beside the training loss."""
        if "loss" in logs:
            logs.update(self._routing_log)
            self._routing_log = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing_checkpoint(checkpoint, writes=self.args.should_save):
            super()._save_checkpoint(model, trial)

    @contextmanager
    def recording(self, model: nn.Module, *, always: bool = False) -> Iterator[RoutingRecord | None]:
        """Record the routing of a forward pass, and keep its figures if it belongs to a step that is logged.

        Args:
            model: as the Trainer passes it, perhaps wrapped for several processes.
            always: record every forward pass, for a loss that needs the routing; else only those that are logged.
        """
        logged = self.logs_step(model)
        if not (logged or always):
            yield None
            return
        with record_routing(self.accelerator.unwrap_model(model)) as routing:
            yield routing
        if logged and len(routing):
            self._routing_log = {
                "active_share": routing.share(),
                "balance_loss": float(routing.balance_loss().detach()),
            }

    def logs_step(self, model: nn.Module) -> bool:
        """Whether the forward pass of `model` that is being made belongs to a training step that is logged."""
        return model.training and (self.state.global_step + 1) % max(1, int(self.state.logging_steps)) == 0
