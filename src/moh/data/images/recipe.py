"""Images and augmentation in a recipe, and the input of a model, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moh._checks import at_least


@dataclass(frozen=True)
class ImageDataRecipe:
    """The labelled images.

    Args:
        dataset: "fashion-mnist"; a directory of class folders, or one that has them in train/ and val/; a tar file of class
            folders, or a directory of tar files (train.tar and val.tar, or one per class); a WebDataset's tar files; or a Hugging
            Face data set on the hub or on disk.
        train_split: split of a Hugging Face data set to train on; default train.
        eval_split: split to evaluate on; default validation or test. Without one, every tenth image of each class is
            held out.
        image_column: column of a Hugging Face data set; default the one that holds images.
        label_column: likewise; default the one that holds class labels.
        image_size: height and width of the model's input; default the model's.
        mean: to normalise with, one number per channel; default that of the model's weights or of the data set.
        std: likewise.
        crop_pct: in evaluation, the middle crop's share of the resized image's side; default the model's.
        interpolation: for resizing; default the model's.
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
            raise ValueError(f"data.mean and data.std must have equally many numbers, got {self.mean} and {self.std}")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"data.std must be above 0, got {self.std}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be above 0 and at most 1, got {self.crop_pct}")


@dataclass(frozen=True)
class AugmentationRecipe:
    """Augmentation of training images, by timm.

    Args:
        crop_scale: smallest and largest share of the image's area that a random crop shows, such as [0.08, 1.0];
            [] shows the whole image.
        crop_interpolation: filter of random crops; "random" chooses bilinear or bicubic for each image.
        repeats: repeated augmentation (arXiv 1902.05509): an epoch has as many images as before, but only 1 / `repeats` of
            them are different ones, each augmented `repeats` times; those are next to each other, nearly always in the same
            step.
        crop_padding: width of a black border in pixels; a random window of the image's size is then shown. For small
            images, instead of `crop_scale`.
        hflip: probability of mirroring.
        color_jitter: strength of changes in brightness, contrast and saturation; timm ignores it with `auto_augment`.
        auto_augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1".
        random_erasing: probability of erasing a rectangle.
        erasing_mode: fill of the rectangle: "pixel" (noise), "rand" (one random colour) or "const" (the mean).
        mixup: alpha of Mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off. With both, each batch uses one of them.
        mix_prob: probability of mixing a batch.
        mix_switch_prob: probability of CutMix if both are on.
        label_smoothing: weight of the uniform distribution in the targets.
    """

    crop_scale: list[float] = field(default_factory=list)
    crop_interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    repeats: int = 1
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
        at_least("augmentation.repeats", self.repeats, 1)
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
class ImageInput:
    """The input of an image model.

    Attributes:
        size: (C, H, W), C = 1 (grey) or 3 (RGB).
        mean: to normalise with, one number per channel, of pixels between 0 and 1.
        std: likewise.
        crop_pct: in evaluation, the middle crop's share of the resized image's side.
        interpolation: for resizing, by timm's name: "bilinear", "bicubic".
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
