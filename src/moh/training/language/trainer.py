"""The transformers Trainer for causal language models: distillation, smoothed labels, and the position in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from moh.data.text.order import StoredMixture
from moh.data.text.streaming import STREAM_KEY, StreamedMixture
from moh.training.checkpoints import trainer_state
from moh.training.routing_trainer import RoutingTrainer

_CHUNK = 256  # tokens at a time: two float32 rows of 50,000 logits each are then 100 MB, not gigabytes


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """`T^2 * sum over predicted tokens of KL(softmax(teacher / T) || softmax(student / T))`, a float32 scalar.

    As in next-token prediction, the logits at position n are those for the label at n + 1; labels of -100 do not count.
    The caller divides the sum by the number of tokens in the step. Chunks are recomputed in the backward pass, so that
    no float32 copy of all logits is ever held.

    Args:
        student_logits: `[B, N, V]`, with gradient.
        teacher_logits: `[B, N, V]`, of the same vocabulary.
        labels: `[B, N]` token ids, or -100.
        temperature: T, above 0.

    Raises:
        ValueError: the logits differ in shape, as those of different vocabularies do.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "teacher and student must give logits of one shape (the same tokenizer and vocabulary), got "
            f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    counts = (labels[:, 1:] != -100).flatten()  # [B*(N-1)]
    student = student_logits[:, :-1].flatten(0, 1)  # [B*(N-1), V]
    teacher = teacher_logits[:, :-1].detach().flatten(0, 1)
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(counts), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = total + checkpoint(
            _summed_kl, student[part], teacher[part], counts[part], temperature, use_reentrant=False
        )
    return total * temperature**2  # the gradient would otherwise shrink as 1 / T^2 (arXiv 1503.02531)


def _summed_kl(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    student_log = F.log_softmax(student.float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
    per_token = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)  # [chunk]
    return torch.where(counts, per_token, 0.0).sum()


def smoothing_change(logits: Tensor, labels: Tensor) -> Tensor:
    """What smoothing with weight 1 adds to the summed next-token loss, a float32 scalar: `sum_n (z_label - mean_v z_v)`.

    The loss with the uniform distribution as its target is `log sum_v exp z_v - mean_v z_v`, with the label
    `log sum_v exp z_v - z_label`: no softmax is left in the difference.

    Args:
        logits: z `[B, N, V]`, with gradient.
        labels: `[B, N]` token ids, or -100; each is predicted from the position before.
    """
    targets = labels[:, 1:]  # [B, N - 1]
    z = logits[:, :-1]
    chosen = z.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1).float()
    return torch.where(targets != -100, chosen - z.mean(-1, dtype=torch.float32), 0.0).sum()


class StreamPosition(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the state of a stream with the Trainer's own, in `trainer_state.json`, the last file of a checkpoint.

    Args:
        values: `STREAM_KEY` of the last sequence trained on.
    """

    def __init__(self, values: list[int] | None = None) -> None:
        self.values = values or []

    def state(self) -> dict[str, Any]:
        return {"args": {"values": self.values}, "attributes": {}}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer would count from where this process began to read
        state.epoch = state.global_step / state.max_steps


def stream_position(checkpoint: Path, batch: int) -> tuple[list[int], int]:
    """A stream's state in a checkpoint, and the number of the first sequence not trained on.

    Args:
        checkpoint: a complete one, of a streaming run.
        batch: sequences per optimiser step.
    """
    state = trainer_state(checkpoint)
    values: list[int] = state["stateful_callbacks"][StreamPosition.__name__]["args"]["values"]
    return values, state["global_step"] * batch


class MoHTrainer(RoutingTrainer):
    """`transformers.Trainer` for causal language models, MoH or dense.

    With a teacher the loss is `(1 - w) L + w T^2 KL(teacher || student) + balance`: L the next-token loss, w the
    `distillation_weight`, T the temperature, both means over all predicted tokens of the step; the load-balance term
    (`config.router_aux_loss_coef` times the loss) keeps its weight. `label_smoothing_factor` smooths the labels of L in
    training.

    A `StoredMixture` is read in its own order; checkpoints keep the position in a `StreamedMixture`.

    Args:
        args: all arguments of `transformers.Trainer`.
        teacher: the dense original, frozen here; None trains without distillation.
        distillation_weight: w, between 0 and 1.
        distillation_temperature: T, above 0.
        kwargs: all arguments of `transformers.Trainer`.

    Raises:
        ValueError: a weight or temperature is out of range, or `use_liger_kernel`, which computes no logits, is combined
            with a teacher or label smoothing, which need them.
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
        # transformers' own takes the labels away from the model, which then adds no balance loss, and from the teacher's loss
        self.label_smoother = None
        if self.args.use_liger_kernel and (teacher is not None or self.args.label_smoothing_factor):
            raise ValueError(
                "use_liger_kernel must be False with distillation or label_smoothing_factor, which need the logits"
            )
        self._stream = StreamPosition()
        if isinstance(self.train_dataset, StreamedMixture):
            self.add_callback(self._stream)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StoredMixture):
            return SequentialSampler(dataset)
        sampler: Sampler[Any] | None = super()._get_train_sampler(train_dataset)
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's batches of a step; removes and keeps the stream's state."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            if (states := batch.pop(STREAM_KEY, None)) is not None:
                self._stream.values = states[-1].tolist()
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; while training, of smoothed labels and mixed with the teacher's."""
        with self.recording(model):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training and self.args.label_smoothing_factor:
            change = self.args.label_smoothing_factor * smoothing_change(outputs.logits, inputs["labels"])
            loss = loss + self._share_of_step(change, inputs["labels"], num_items_in_batch)
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
        coefficient = getattr(self.accelerator.unwrap_model(model).config, "router_aux_loss_coef", 0.0)
        balance = outputs.get("aux_loss")
        if coefficient and balance is not None:
            # the call's share of the step, as in the model's own loss
            loss = loss + coefficient * balance * (labels[:, 1:] != -100).sum()
        return self.distillation_weight * self._share_of_step(loss, labels, num_items_in_batch)

    def _share_of_step(self, total: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A sum over the predicted tokens of this call, scaled like the Trainer's loss."""
        if num_items_in_batch is None:
            return total / (labels[:, 1:] != -100).sum()
        # Every process divides by the tokens of all, and DDP averages: times their number undoes the average
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items_in_batch * processes
