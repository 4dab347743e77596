"""A training run of an image classifier as data: frozen dataclasses, every field validated once, at construction.

Not for reading files (`moh.training.recipe_file`) nor for running anything (`moh.training.images.run`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moh.training.settings import ConversionSettings, ImageTrainingSettings, at_least


@dataclass(frozen=True)
class ImageModelRecipe:
    """The model to train, by timm's name.

    Args:
        name: a model of timm or of ours ("moh_transnext_small_75"), "hf-hub:NAME" or "local-dir:PATH".
        pretrained: start from the weights that belong to the name (downloaded, or in the local directory).
        weights: a file of weights to start from instead (.safetensors, or .pth read without unpickling code).
        drop_path: rate of stochastic depth, growing over the layers up to this.
        kwargs: more arguments of `timm.create_model`: img_size, in_chans, shared_heads, active_heads and so on.
            The number of classes comes from the data.
    """

    name: str
    pretrained: bool = False
    weights: str | None = None
    drop_path: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be at least 0 and below 1, got {self.drop_path}")
        for name, instead in {
            "num_classes": "it comes from the data",
            "drop_path_rate": "set model.drop_path",
            "pretrained": "set model.pretrained",
        }.items():
            if name in self.kwargs:
                raise ValueError(f"model.kwargs must not set {name}: {instead}")


@dataclass(frozen=True)
class ImageConversionRecipe(ConversionSettings):
    """How the dense model becomes a MoH model before training: `ConversionSettings`, and what follows.

    Args:
        calibration_images: training images that the conversion looks at; "query_norm" needs none.
    """

    calibration_images: int = 256


@dataclass(frozen=True)
class ImageDataRecipe:
    """The labelled images.

    Args:
        dataset: "fashion-mnist"; a directory of class folders, or one with train/ and val/ that hold them; or a data set
            of the Hugging Face hub or on disk.
        train_split: split of a Hugging Face data set to train on; default train.
        eval_split: split to evaluate on; default validation or test. Where there is none, every tenth image of each
            class is held out.
        image_column: column of a Hugging Face data set; default the one that holds images.
        label_column: likewise; default the one that holds class labels.
        image_size: height and width that the model gets; default those of the model.
        mean: to normalise with, one number per channel; default those of the model's weights or of the data set.
        std: likewise.
        crop_pct: evaluation: the middle crop's share of the resized image's side; default the model's.
        interpolation: of resizing; default the model's.
        cache_dir: where fetched data is kept (default ~/.cache/moh).
    """

    dataset: str
    train_split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    crop_pct: float | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("data.dataset must name a data set or a directory")
        if self.image_size is not None:
            at_least("data.image_size", self.image_size, 1)
        if len(self.mean) != len(self.std):
            raise ValueError(f"data.mean and data.std must have as many numbers, got {self.mean} and {self.std}")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"data.std must be above 0, got {self.std}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be above 0 and at most 1, got {self.crop_pct}")


@dataclass(frozen=True)
class ImageTrainingRecipe(ImageTrainingSettings):
    """How to train an image classifier: `ImageTrainingSettings`, with other defaults, and what follows.

    Args:
        max_steps: optimiser steps; 0 if `epochs` says it.
        epochs: passes over the training images, instead of `max_steps`.
        warmup_epochs: passes with a rising learning rate, instead of `warmup_steps`.
        warmup_lr: learning rate of the first step.
        min_lr: learning rate of the last step.
        ema_decay: 0 keeps no average.
        eval_steps: steps between two evaluations; 0 evaluates once per epoch.
        per_device_eval_batch_size: images per process and evaluated batch.
    """

    max_steps: int = 0
    learning_rate: float = 1e-3
    warmup_steps: float = 0
    lr_scheduler_type: str = "cosine_warmup_with_min_lr"
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 128
    logging_steps: int = 10
    save_steps: int = 500
    epochs: float = 0
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    eval_steps: int = 0
    per_device_eval_batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "eval_steps"):
            at_least(f"training.{name}", getattr(self, name), 0)
        at_least("training.per_device_eval_batch_size", self.per_device_eval_batch_size, 1)
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("training.warmup_epochs and training.warmup_steps must not both be set")
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
                f"one of training.max_steps and training.epochs must be above 0, got {self.max_steps} and {self.epochs}"
            )


@dataclass(frozen=True)
class AugmentationRecipe:
    """What is done to training images; timm does it.

    Args:
        crop_scale: smallest and largest share of the image's area that a random crop shows, such as [0.08, 1.0];
            [] shows the whole image.
        crop_padding: pixels of black around the image, of which a random window of its size is shown; small images
            are cropped this way, instead of with `crop_scale`.
        hflip: probability of mirroring.
        color_jitter: strength of changes of brightness, contrast and saturation; timm leaves them out with `auto_augment`.
        auto_augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1".
        random_erasing: probability of erasing a rectangle.
        erasing_mode: what it is filled with: "pixel" (noise), "rand" (one random colour) or "const" (the mean).
        mixup: alpha of Mixup; 0 does none.
        cutmix: alpha of CutMix; 0 does none. With both, each batch takes one of them.
        mix_prob: probability of mixing a batch.
        mix_switch_prob: probability of CutMix where there are both.
        label_smoothing: weight of the uniform distribution in the targets.
    """

    crop_scale: list[float] = field(default_factory=list)
    crop_padding: int = 0
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "color_jitter", "mixup", "cutmix"):
            at_least(f"augmentation.{name}", getattr(self, name), 0)
        for name in ("hflip", "random_erasing", "mix_prob", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"augmentation.label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        scale = self.crop_scale
        if scale and (len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(
                f"augmentation.crop_scale must be [] or two rising numbers above 0 and at most 1, got {scale}"
            )
        if scale and self.crop_padding:
            raise ValueError("augmentation.crop_scale and augmentation.crop_padding must not both be set")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ImageRecipe:
    """One training run of an image classifier.

    Args:
        model: the model to train.
        data: the images.
        training: how to train.
        augmentation: what is done to the training images.
        conversion: how to make a MoH model of the model first; null trains it as it is.
        task: tells recipes of image classifiers from others.
    """

    model: ImageModelRecipe
    data: ImageDataRecipe
    training: ImageTrainingRecipe
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    conversion: ImageConversionRecipe | None = None
    task: Literal["image_classification"] = "image_classification"

    def __post_init__(self) -> None:
        if self.conversion is not None:  # here, because the parser hides what an optional part raises
            at_least("conversion.calibration_images", self.conversion.calibration_images, 1)
        if self.augmentation.mixes and self.training.per_device_train_batch_size % 2:
            raise ValueError(
                "training.per_device_train_batch_size must be even for augmentation.mixup or cutmix, "
                f"got {self.training.per_device_train_batch_size}"
            )
