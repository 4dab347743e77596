"""The transformers Trainer with a log of the routing, for models of any family.

A model without MoH layers has no routing to log. Losses and data are left to subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from moh.routing import RoutingRecord, balance_over_processes, record_routing
from moh.training.checkpoints import shard_on_cpus, writing_checkpoint


class RoutingTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` whose log has `active_share`, the mean share of heads that a token used, and `balance_loss`.

    The history, also on disk (`trainer_state.json`), also has `routed_load`: for each layer, the list of its routed heads'
    loads. All are of the last batch before the entry. The last step is logged whatever `logging_steps`.

    Args:
        args: all arguments of `transformers.Trainer`.
        balance_loss_scope: "process" or "global": take the balance loss, in training and in the log, over each process's
            tokens or over those of all processes (`moh.balance_over_processes`).
        kwargs: all arguments of `transformers.Trainer`.
    """

    can_be_sharded = True
    """Whether saving and averaging are right if each process holds only part of the weights."""

    def __init__(self, *args: Any, balance_loss_scope: Literal["process", "global"] = "process", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance_loss_scope = balance_loss_scope
        self._routing_log: dict[str, float] = {}
        self._routed_load: list[list[float]] = []
        self.add_callback(LogLastStep())

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does, with FSDP2 also on CPU processes.

        Raises:
            ValueError: FSDP or DeepSpeed's ZeRO-3 is requested, but `can_be_sharded` is False.
        """
        super().create_accelerator_and_postprocess()
        plugin = self.args.fsdp_plugin_args
        if shard_on_cpus(self.accelerator, None if plugin is None else FullyShardedDataParallelPlugin(**plugin)):
            self.is_fsdp_enabled = True
        deepspeed = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if not self.can_be_sharded and (self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)):
            raise ValueError(
                "FSDP and DeepSpeed's ZeRO-3 are for language models only; this model must be whole on every process, as with "
                "recipes/accelerate/ddp.yaml"
            )

    def compute_loss_context_manager(self) -> ExitStack:
        """As the Trainer's; with scope "global", balance losses in training are taken over all processes."""
        stack: ExitStack = super().compute_loss_context_manager()
        if self.balance_loss_scope == "global" and self.model.training:
            stack.enter_context(balance_over_processes())
        return stack

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the routing next to the training loss."""
        if "loss" in logs:
            logs.update(self._routing_log)
            self._routing_log = {}
        super().log(logs, start_time)
        if "loss" in logs and self._routed_load:  # after logging: loggers such as TensorBoard take only numbers
            self.state.log_history[-1]["routed_load"] = self._routed_load
            self._routed_load = []

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; with DeepSpeed also if no step was left, so its engine was never made."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            self._save(output_dir)  # the model is still whole
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered from shards, where tied weights have become separate tensors
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
            state_dict = {name: t for name, t in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing_checkpoint(checkpoint, writes=self.args.should_save):
            super()._save_checkpoint(model, trial)

    @contextmanager
    def recording(self, model: nn.Module, *, always: bool = False) -> Iterator[RoutingRecord | None]:
        """Record the routing of a forward pass, and keep its figures if its step is logged.

        Args:
            model: as the Trainer passes it, perhaps wrapped for several processes.
            always: record every forward pass, for a loss that needs the routing; else only logged ones.
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
            self._routed_load = [
                [round(load, 4) for load in info.load()[list(info.config.routed_indices)].tolist()]
                for _, info in routing
            ]

    def logs_step(self, model: nn.Module) -> bool:
        """Whether the current forward pass of `model` belongs to a training step that is logged."""
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps))
        return model.training and (step % every == 0 or step == self.state.max_steps)


class LogLastStep(TrainerCallback):  # type: ignore[misc]
    """Log the last step, before its checkpoint is written, also if it isn't a multiple of `logging_steps`."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True
        return control
