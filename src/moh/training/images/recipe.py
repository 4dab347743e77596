"""A training run of an image classifier as data: frozen dataclasses, every field validated once, at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moh._checks import at_least
from moh.data.images.recipe import AugmentationRecipe, ImageDataRecipe
from moh.models.kinds import TIMM_SOURCES
from moh.training.recipes import ConversionSettings, ImageTrainingSettings

_COSINE = "cosine_warmup_with_min_lr"


@dataclass(frozen=True)
class ImageModelRecipe:
    """The model to train, by its name in timm.

    Args:
        name: a model of timm or this package ("moh_transnext_small_75"), "hf-hub:NAME" or "local-dir:PATH".
        pretrained: start from the weights that belong to the name (downloaded, or in the local directory).
        weights: a file of weights to start from instead (.safetensors, or .pth read without unpickling code).
        frozen: train the classifier alone, on the features of the weights as they are.
        drop_path: rate of stochastic depth in the last layer; it rises linearly from 0.
        kwargs: further arguments of `timm.create_model`: img_size, in_chans, shared_heads, active_heads and so on.
            The number of classes comes from the data.
    """

    name: str
    pretrained: bool = False
    weights: str | None = None
    frozen: bool = False
    drop_path: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be at least 0 and below 1, got {self.drop_path}")
        if self.frozen and not self.pretrained and self.weights is None:
            raise ValueError("model.frozen needs weights to keep: set model.pretrained or model.weights")
        for name, instead in {
            "num_classes": "it comes from the data",
            "drop_path_rate": "set model.drop_path",
            **dict.fromkeys(TIMM_SOURCES, "weights come from model.pretrained or model.weights"),
            "pretrained": "set model.pretrained",
        }.items():
            if name in self.kwargs:
                raise ValueError(f"model.kwargs must not set {name}: {instead}")


@dataclass(frozen=True)
class ImageConversionRecipe(ConversionSettings):
    """How the dense model becomes a MoH model before training: `ConversionSettings` plus the following.

    Args:
        calibration_images: training images that the conversion reads; "query_norm" needs none.
    """

    calibration_images: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("conversion.calibration_images", self.calibration_images, 1)


@dataclass(frozen=True)
class ImageTrainingRecipe(ImageTrainingSettings):
    """How to train an image classifier: `ImageTrainingSettings` with other defaults, plus the following.

    Args:
        max_steps: optimiser steps; 0 if `epochs` is set.
        epochs: passes over the training images, instead of `max_steps`.
        warmup_epochs: passes with a rising learning rate, instead of `warmup_steps`.
        warmup_lr: learning rate of the first step, if there is a warm-up.
        min_lr: learning rate of the last step; with `rate_changes="epoch"` the last epoch stays above it.
        ema_decay: 0 keeps no average.
        rate_changes: "step", or "epoch" for the published schedule (timm's): the rate stays the same within an epoch, and
            the first two epochs have the same: `warmup_lr` if there is a warm-up, else `learning_rate`.
        keep_best: also keep the model with the highest held-out top-1, in best/ of the output directory.
        eval_steps: steps between two evaluations; 0 evaluates once per epoch.
        per_device_eval_batch_size: images per process and batch in evaluation.
    """

    max_steps: int = 0
    learning_rate: float = 1e-3
    warmup_steps: float = 0
    lr_scheduler_type: str = _COSINE
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 128
    logging_steps: int = 10
    save_steps: int = 500
    epochs: float = 0
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    rate_changes: Literal["step", "epoch"] = "step"
    keep_best: bool = False
    eval_steps: int = 0
    per_device_eval_batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "eval_steps"):
            at_least(f"training.{name}", getattr(self, name), 0)
        at_least("training.per_device_eval_batch_size", self.per_device_eval_batch_size, 1)
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("training.warmup_epochs and training.warmup_steps must not both be set")
        if self.rate_changes == "epoch" and self.lr_scheduler_type != _COSINE:
            raise ValueError(
                f"training.lr_scheduler_type must be {_COSINE!r} for training.rate_changes='epoch', got "
                f"{self.lr_scheduler_type!r}"
            )
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"training.{name} must be at most training.learning_rate = {self.learning_rate}, "
                    f"got {getattr(self, name)}"
                )

    def _check_length(self) -> None:
        at_least("training.max_steps", self.max_steps, 0)
        at_least("training.epochs", self.epochs, 0)
        if bool(self.max_steps) == bool(self.epochs):
            raise ValueError(
                f"one of training.max_steps and training.epochs must be above 0 and the other 0, got {self.max_steps} and "
                f"{self.epochs}"
            )


@dataclass(frozen=True)
class ImageRecipe:
    """One training run of an image classifier.

    Args:
        model: the model to train.
        data: the images.
        training: how to train.
        augmentation: of the training images.
        conversion: how to convert the model first; null trains it as it is.
        task: distinguishes recipes of image classifiers from others.
    """

    model: ImageModelRecipe
    data: ImageDataRecipe
    training: ImageTrainingRecipe
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    conversion: ImageConversionRecipe | None = None
    task: Literal["image_classification"] = "image_classification"

    def __post_init__(self) -> None:
        if self.augmentation.mixes and self.training.per_device_train_batch_size % 2:
            raise ValueError(
                "training.per_device_train_batch_size must be even for augmentation.mixup or cutmix, "
                f"got {self.training.per_device_train_batch_size}"
            )
