"""The transformers Trainer for image classifiers: soft targets, balance loss, moving average of weights, top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, TrainerCallback

from moh._files import replacing_directory
from moh.data.images.batches import SKIPPED, ImageBatches, RepeatedOrder
from moh.data.images.sources import take
from moh.models.timm.loading import save_image_classifier
from moh.training.average import Averaging, MovingAverage
from moh.training.routing_trainer import RoutingTrainer
from moh.training.session import without_autocast

_EMA_FILE = "ema.safetensors"


class ImageTrainer(RoutingTrainer):
    """`transformers.Trainer` for timm models on batches of `images` and `labels` (`ImageBatches`).

    The loss is the cross-entropy with the (smoothed or mixed) targets + `balance_loss_coef` times the mean of the layers'
    load-balance losses. The moving average is evaluated if there is one: `eval_top1` and `eval_top5` are percentages,
    `eval_loss` the mean cross-entropy with the true labels.

    Args:
        args: all arguments of `transformers.Trainer`.
        model_args: arguments of `timm.create_model` that rebuild the model; saved with it.
        balance_loss_coef: weight of the load-balance loss.
        label_smoothing: for labels that are not mixed (mixed ones are smoothed already).
        ema_decay: decay of the moving average; 0 keeps none.
        ema_warmup: use a smaller decay in the first steps.
        rate_at: step, from 0 -> the learning rate as a part of its peak, instead of the schedule that `args` name.
        best_dir: where the model with the highest `eval_top1` is kept; None keeps none.
        kwargs: all arguments of `transformers.Trainer`.
    """

    can_be_sharded = False

    def __init__(
        self,
        *args: Any,
        model_args: Mapping[str, Any],
        balance_loss_coef: float = 0.0,
        label_smoothing: float = 0.0,
        ema_decay: float = 0.0,
        ema_warmup: bool = False,
        rate_at: Callable[[int], float] | None = None,
        best_dir: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            data_collator=take,
            compute_metrics=_metrics,
            preprocess_logits_for_metrics=_per_image,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over images, whatever the model's forward takes
        self.model_args = dict(model_args)
        self.balance_loss_coef = balance_loss_coef
        self.label_smoothing = label_smoothing
        self.average: MovingAverage | None = None
        if ema_decay:
            ramp = (lambda steps: 1 - (1 + steps) ** (-2 / 3)) if ema_warmup else None  # as timm's ModelEmaV3
            self.average = MovingAverage(self.model, ema_decay, ramp=ramp)
            self.add_callback(Averaging(self.average))
        self.rate_at = rate_at
        self.add_callback(_Epochs())
        if best_dir is not None:
            self.add_callback(_Best(self, best_dir))

    @property
    def final_model(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one, else the model, without the Trainer's autocast."""
        if self.average is not None:
            return self.average.module
        return without_autocast(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Training: cross-entropy with the targets, plus the balance loss. Evaluation: with the labels, without skipped ones."""
        labels = inputs["labels"]
        balanced = model.training and self.balance_loss_coef > 0
        with self.recording(model, always=balanced) as routing:
            logits = model(inputs["images"])
        if not model.training:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=SKIPPED)
        else:  # torch's loss takes mixed targets [B, K], which are smoothed already, as well as labels [B]
            smoothing = self.label_smoothing if labels.ndim == 1 else 0.0
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        if balanced and routing is not None and len(routing):
            loss = loss + self.balance_loss_coef * routing.balance_loss()
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: no biases, no vectors (norms, temperatures), none of the model's `no_weight_decay`."""
        excluded = set(getattr(model, "no_weight_decay", set)())
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith(".bias") and name not in excluded
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """`rate_at` if there is one, else the schedule of the Trainer's arguments."""
        if self.rate_at is not None and getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, self.rate_at)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ImageBatches) or dataset.repeats == 1:
            return super()._get_train_sampler(train_dataset)  # type: ignore[no-any-return]
        return RepeatedOrder(dataset, processes=self.args.world_size, batch_size=self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All evaluation images, including an incomplete last batch (training reads only full ones)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            sampler=self._get_eval_sampler(dataset),
            collate_fn=take,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the averaged weights if there are some."""
        with self._averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model being trained, and its moving average next to it."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        save_image_classifier(self.accelerator.unwrap_model(self.model), directory, model_args=self.model_args)
        if self.average is not None:
            save_file(self.average.module.state_dict(), directory / _EMA_FILE)

    def restore(self, checkpoint: str | Path) -> None:
        """Read what `save_model` wrote.

        Raises:
            ValueError: the recipe keeps a moving average, but the checkpoint has none.
        """
        directory = Path(checkpoint)
        self.accelerator.unwrap_model(self.model).load_state_dict(load_file(directory / "model.safetensors"))
        if self.average is not None:
            if not (directory / _EMA_FILE).is_file():
                raise ValueError(
                    f"training.ema_decay needs the moving average of the interrupted run, but {directory} has none: "
                    "set it to 0, or start again in another directory"
                )
            self.average.module.load_state_dict(load_file(directory / _EMA_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.restore(resume_from_checkpoint)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Sets the images' epoch when a pass over them begins; accelerate's loaders do so only in some cases."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))


class _Best(TrainerCallback):  # type: ignore[misc]
    """Keeps the evaluated model if no kept one had a higher top-1; of equal ones the last, as published.

    Marks the log's entry with "best": a resumed run compares with these alone, since a model that was evaluated without
    being kept is lost.
    """

    def __init__(self, trainer: ImageTrainer, directory: Path) -> None:
        self.trainer, self.directory = trainer, directory

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        kept = (
            [entry["eval_top1"] for entry in state.log_history if entry.get("best")] if self.directory.exists() else []
        )
        if not args.should_save or metrics["eval_top1"] < max(kept, default=0.0):
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model) if trainer.average is None else trainer.average.module
        with replacing_directory(self.directory, known=True) as scratch:
            save_image_classifier(model, scratch, model_args=trainer.model_args)
        state.log_history[-1]["best"] = True  # after logging: TensorBoard takes only numbers


def _per_image(logits: Tensor, labels: Tensor) -> Tensor:
    """`[B, 3]` float32 per image: whether the label is the likeliest class, whether among the top five, cross-entropy."""
    known = labels.clamp(min=0)
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == known[:, None]  # [B, 5]
    loss = F.cross_entropy(logits.float(), known, reduction="none")
    return torch.stack([best[:, 0].float(), best.any(-1).float(), loss], dim=-1)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over the images that could be read."""
    top1, top5, loss = prediction.predictions[prediction.label_ids != SKIPPED].mean(0)
    return {"top1": 100 * float(top1), "top5": 100 * float(top5), "loss": float(loss)}
