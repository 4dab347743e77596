"""One training run of an image classifier, from a recipe to a saved model: images, model, Trainer.

The steps themselves are the Trainer's (`moh.training.images.trainer`). Also runs under `torchrun`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from moh._files import check_replaceable
from moh.data.images.batches import ImageBatches, report_damaged
from moh.data.images.datasets import load_images
from moh.data.images.sources import ImageSource, with_classes
from moh.models.kinds import saved_config
from moh.models.timm.loading import load_image_classifier, save_image_classifier
from moh.training.images.model import build_model, convert_model, freeze, prepare, resolve_input, saved_arguments
from moh.training.images.recipe import ImageRecipe, ImageTrainingRecipe
from moh.training.images.trainer import ImageTrainer
from moh.training.session import RunResult, Session, open_session, save_card, saving, training_arguments


@dataclass(frozen=True, kw_only=True)
class ImageTrainResult(RunResult):
    """The result of a run; adds model, classes and damaged images to `RunResult`.

    Attributes:
        model: the trained model (its moving average, if one was kept), in evaluation mode.
        classes: names of its classes.
        damaged: training images that this process could not read and replaced with the next one.
    """

    model: nn.Module
    classes: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def top1(self) -> list[tuple[int, float]]:
        """(step, top-1 in percent) of every evaluation."""
        return [(int(entry["step"]), float(entry["eval_top1"])) for entry in self.log_history if "eval_top1" in entry]


def train(
    recipe: ImageRecipe,
    *,
    model: nn.Module | None = None,
    train_dataset: ImageSource | None = None,
    eval_dataset: ImageSource | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> ImageTrainResult:
    """Run a recipe; if `output_dir` holds complete checkpoints of the same recipe, resume from the last one.

    Args:
        recipe: the run.
        model: a model to train instead of the recipe's. The recipe's `model` section must still describe it, because
            loading the saved model rebuilds it from that.
        train_dataset: instead of the recipe's images (`TensorImages`, for example); augmented by the recipe.
        eval_dataset: likewise; needed with `train_dataset`.
        callbacks: more callbacks of the transformers Trainer.

    Raises:
        ValueError: a field of the recipe is wrong or unsupported; names it, and is raised before training.
    """
    session = open_session(recipe)
    best_dir = session.output_dir / "best" if recipe.training.keep_best else None
    if best_dir is not None:
        check_replaceable(best_dir, name="training.output_dir: its", known=session.begun)
    train_images, eval_images = _images(recipe, session, train_dataset, eval_dataset)
    names = saved_config(session.checkpoint).get("label_names") if session.checkpoint is not None else None
    if names:
        train_images = with_classes(train_images, names, what="the training images", than="the checkpoint")
        eval_images = with_classes(eval_images, names, what="the held-out images", than="the checkpoint")
    classes = train_images.classes
    per_epoch = _steps_per_epoch(session, len(train_images.labels))
    session = _counted(session, per_epoch)
    set_seed(recipe.training.seed)  # for new weights; the Trainer sets it only before training
    recipe, checkpoint = session.recipe, session.checkpoint
    settings = recipe.training

    if checkpoint is not None and model is None:
        model = load_image_classifier(checkpoint)  # its weights need no conversion
        wanted = resolve_input(recipe, model, train_images)
    else:
        given, model = model, model if model is not None else build_model(recipe.model, classes)
        wanted = resolve_input(recipe, model, train_images)
        if given is None and recipe.conversion is not None:
            model = convert_model(recipe, model, wanted, train_images, session.arguments)
    prepare(model, wanted, classes)
    if recipe.model.frozen:
        freeze(model)
    if settings.gradient_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    session.write_recipe()

    rate_at = None
    if settings.rate_changes == "epoch":
        peak = settings.learning_rate or 1.0  # if the peak is 0, so are min_lr and warmup_lr
        rate_at = partial(
            epoch_rate,
            per_epoch=per_epoch,
            steps=settings.max_steps,
            warmup_steps=session.arguments.get_warmup_steps(settings.max_steps),
            warmup_rate=settings.warmup_lr / peak,
            min_rate=settings.min_lr / peak,
        )
    batches = ImageBatches(train_images, wanted, augmentation=recipe.augmentation, seed=settings.seed)
    eval_batches = ImageBatches(eval_images, wanted)
    trainer = ImageTrainer(
        model=model.train(),
        args=session.arguments,
        train_dataset=batches,
        eval_dataset=eval_batches,
        callbacks=list(callbacks),
        model_args=saved_arguments(recipe.model, model),
        balance_loss_coef=settings.balance_loss_coef,
        balance_loss_scope=settings.balance_loss_scope,
        label_smoothing=recipe.augmentation.label_smoothing,
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        rate_at=rate_at,
        best_dir=best_dir,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    history = session.run(trainer)
    if not any("eval_top1" in entry and entry["step"] == settings.max_steps for entry in history):
        history.append({**trainer.evaluate(), "step": settings.max_steps})
    model_dir = session.output_dir / "model"
    with saving(trainer, model_dir) as scratch:
        if trainer.args.should_save:
            save_image_classifier(trainer.final_model, scratch, model_args=trainer.model_args)
            top1 = [(entry["step"], entry["eval_top1"]) for entry in history if "eval_top1" in entry][-1:]
            results = [(f"held-out top-1, step {step:,}", f"{value:.1f} %", "–") for step, value in top1]
            start = recipe.model.weights or (recipe.model.name if recipe.model.pretrained else None)
            base = None if start is None else start.removeprefix("local-dir:")
            save_card(recipe, trainer.final_model, scratch, base=base, data=[recipe.data.dataset], results=results)
    damaged = report_damaged(train_images, batches.damaged, what="replaced by the next one")
    report_damaged(eval_images, eval_batches.damaged, what="left out of the evaluation")
    return ImageTrainResult(
        model=trainer.final_model.eval(),
        classes=classes,
        damaged=damaged,
        model_dir=model_dir,
        log_history=history,
        precision=session.precision,
        resumed_from=checkpoint,
    )


def _images(
    recipe: ImageRecipe, session: Session, train: ImageSource | None, heldout: ImageSource | None
) -> tuple[ImageSource, ImageSource]:
    if train is None:
        with session.arguments.main_process_first(desc="fetching the images"):
            return load_images(recipe.data)
    if heldout is None:
        raise ValueError("eval_dataset must be given with train_dataset")
    return train, with_classes(heldout, train.classes, what="eval_dataset", than="train_dataset")


def _steps_per_epoch(session: Session, images: int) -> int:
    """Optimiser steps per pass over the images; incomplete batches are dropped, the last step accumulates what is left.

    Raises:
        ValueError: fewer images than one forward pass of all processes reads.
    """
    settings: ImageTrainingRecipe = session.recipe.training
    per_pass: int = settings.per_device_train_batch_size * session.arguments.world_size
    if images < per_pass:
        raise ValueError(
            f"there are {images} training images, fewer than the {per_pass} that one forward pass reads: "
            "lower training.per_device_train_batch_size, or give more images"
        )
    return math.ceil(images // per_pass / settings.gradient_accumulation_steps)


def _counted(session: Session, per_epoch: int) -> Session:
    """The session with epochs converted to steps, and the Trainer's arguments for images."""
    settings: ImageTrainingRecipe = session.recipe.training
    settings = dataclasses.replace(
        settings,
        max_steps=settings.max_steps or max(1, round(settings.epochs * per_epoch)),
        warmup_steps=settings.warmup_steps or round(settings.warmup_epochs * per_epoch),
        eval_steps=settings.eval_steps or per_epoch,
        epochs=0,
        warmup_epochs=0,
    )
    arguments = image_arguments(settings, precision=session.precision)
    return dataclasses.replace(
        session, recipe=dataclasses.replace(session.recipe, training=settings), arguments=arguments
    )


def epoch_rate(
    step: int, *, per_epoch: int, steps: int, warmup_steps: float, warmup_rate: float, min_rate: float
) -> float:
    """The published learning rate at a step, as a part of its peak.

    It is timm's cosine schedule over the epochs, whose first ones a linear warm-up replaces. The published script sets it
    after each epoch to that epoch's number, so epoch e has the rate of e - 1, and the first two the same.

    Args:
        step: counted from 0.
        per_epoch: steps per epoch.
        steps, warmup_steps: of the run and of its warm-up.
        warmup_rate, min_rate: the first and the last rate, as parts of the peak.
    """
    at = max(step // per_epoch - 1, 0) * per_epoch
    if at < warmup_steps:
        return warmup_rate + (1 - warmup_rate) * at / warmup_steps
    return min_rate + (1 - min_rate) * (1 + math.cos(math.pi * at / steps)) / 2


def image_arguments(settings: ImageTrainingRecipe, *, precision: str) -> TrainingArguments:
    """The transformers arguments of a recipe whose number of steps is known.

    Raises:
        ValueError: `extra` has an unknown name, or `fsdp`, which image classifiers don't support.
    """
    own: dict[str, Any] = {
        "eval_strategy": "steps",  # "epoch" would evaluate after the checkpoint of the same step
        "prediction_loss_only": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_num_workers": settings.workers,
    }
    if settings.lr_scheduler_type == "cosine_warmup_with_min_lr":
        peak = settings.learning_rate or 1.0  # if the peak is 0, so are min_lr and warmup_lr
        own["lr_scheduler_kwargs"] = {
            "min_lr_rate": settings.min_lr / peak,
            "warmup_lr_rate": settings.warmup_lr / peak,
        }
    # timm's models have their own switch for checkpointing
    plain = dataclasses.replace(settings, gradient_checkpointing=False, extra={**own, **settings.extra})
    arguments = training_arguments(plain, precision=precision)
    if arguments.fsdp:
        raise ValueError(
            "training.extra.fsdp is not supported for image classifiers: every process holds the whole model"
        )
    if arguments.label_smoothing_factor:
        raise ValueError("training.extra must not set label_smoothing_factor: set augmentation.label_smoothing")
    return arguments
