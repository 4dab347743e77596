"""Transforms of images for a model: timm's, and the same, faster, for small images in memory.

Mixing is in `batches`. Randomness comes from outside: a seed per image and epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from moh.data.images.recipe import AugmentationRecipe, ImageInput
from moh.data.images.sources import TensorImages
from moh.data.seeds import generator_of, generators_kept, seed_all

ImageTransform = Callable[[Image.Image], Tensor]
"""PIL image -> `[C, H, W]` float32, normalised."""


@dataclass(frozen=True)
class ProcessorInput:
    """A model's input as an image processor of transformers makes it; for evaluation and calibration.

    Args:
        processor: as `AutoImageProcessor` loads it.
        channels: of the model's input.
    """

    processor: Any
    channels: int = 3

    def __call__(self, image: Image.Image) -> Tensor:
        """`[C, H, W]` float32."""
        readable = image.convert("L" if self.channels == 1 else "RGB")
        pixels: Tensor = self.processor(readable, return_tensors="pt")["pixel_values"][0]
        return pixels

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        channels, height, width = self(Image.new("RGB", (64, 64))).shape
        return channels, height, width


def eval_transform(wanted: ImageInput | ProcessorInput) -> ImageTransform:
    """Resize, middle crop, normalise; or what the processor does."""
    if isinstance(wanted, ProcessorInput):
        return wanted
    transform = create_transform(
        wanted.size, mean=wanted.mean, std=wanted.std, crop_pct=wanted.crop_pct, interpolation=wanted.interpolation
    )
    return _with_mode(wanted, transform)


def train_transform(wanted: ImageInput, recipe: AugmentationRecipe) -> ImageTransform:
    """Crop, mirror, policy or colours, normalise, erase; draws from the global generators of Python, NumPy and torch.

    Raises:
        ValueError: `recipe.auto_augment` is not one of timm's policies.
    """
    try:
        transform = create_transform(
            wanted.size,
            is_training=True,
            scale=(recipe.crop_scale[0], recipe.crop_scale[1]) if recipe.crop_scale else None,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.crop_interpolation if recipe.crop_scale else wanted.interpolation,
            mean=wanted.mean,
            std=wanted.std,
            re_prob=recipe.random_erasing,
            re_mode=recipe.erasing_mode,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"augmentation.auto_augment {recipe.auto_augment!r} is not one of timm's: {error}") from None
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    if not recipe.crop_scale:  # replaces timm's first step, a random crop
        steps = [transforms.Resize(wanted.size[1:], str_to_interp_mode(wanted.interpolation))]  # type: ignore[no-untyped-call]
        if recipe.crop_padding:
            steps.append(transforms.RandomCrop(wanted.size[1:], padding=recipe.crop_padding))
        transform = transforms.Compose([*steps, *transform.transforms[1:]])
    return _with_mode(wanted, transform)


def _operations(transform: transforms.Compose) -> Iterator[AugmentOp]:
    """The operations of timm's policies, of any kind."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for part in getattr(step, "policy", ()):
            yield from part


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """As timm's: the strongest posterising keeps no bits, a black image; Pillow refuses that from version 13 on."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _with_mode(wanted: ImageInput, transform: Callable[[Image.Image], Tensor]) -> ImageTransform:
    return partial(_convert_and, transform, "L" if wanted.size[0] == 1 else "RGB")


def _convert_and(transform: Callable[[Image.Image], Tensor], mode: str, image: Image.Image) -> Tensor:
    return transform(image.convert(mode))


class PixelTransform:
    """Images in memory -> a batch, `[B, C, H, W]` float32, normalised and, with a recipe, augmented, all at once.

    Args:
        source: images of the model's size and number of channels (`fits`).
        wanted: the model's input.
        recipe: random window, mirroring and erasing; None changes nothing.
        seed: for the random numbers, with the epoch and the image's index.
    """

    def __init__(self, source: TensorImages, wanted: ImageInput, recipe: AugmentationRecipe | None, seed: int) -> None:
        self.pixels = source.pixels
        self.recipe = recipe
        self.seed = seed
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
        self.erasing = None
        if recipe is not None and recipe.random_erasing:  # with probability 1: `_draws` decides which images
            self.erasing = RandomErasing(1.0, mode=recipe.erasing_mode, max_count=1, device="cpu")  # type: ignore[no-untyped-call]
        self._epoch = -1
        self._drawn: dict[str, Tensor] = {}

    @staticmethod
    def fits(source: object, wanted: ImageInput | ProcessorInput, recipe: AugmentationRecipe | None) -> bool:
        """Whether this handles the images and everything in the recipe."""
        if not isinstance(source, TensorImages) or not isinstance(wanted, ImageInput):
            return False
        if tuple(source.pixels.shape[1:]) != tuple(wanted.size):
            return False
        if recipe is None:
            return wanted.crop_pct == 1
        return not (recipe.crop_scale or recipe.auto_augment or recipe.color_jitter)

    def __call__(self, indices: list[int], epoch: int) -> Tensor:
        places = torch.tensor(indices)  # of images, or of their repeats
        pixels = self.pixels[places % len(self.pixels)]  # [B, C, H, W]
        recipe = self.recipe
        if recipe is None:
            return self._normalised(pixels)
        drawn = {name: values[places] for name, values in self._draws(epoch).items()}
        if recipe.crop_padding:
            pixels = _windows(pixels, drawn["top"], drawn["left"], recipe.crop_padding)
        if recipe.hflip:
            pixels = torch.where(drawn["flip"].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        images = self._normalised(pixels)
        if self.erasing is not None:
            with generators_kept():
                for row in drawn["erase"].nonzero().flatten().tolist():
                    seed_all(self.seed, epoch, indices[row])
                    self.erasing(images[row])
        return images

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def _draws(self, epoch: int) -> dict[str, Tensor]:
        """Window, mirroring and erasing of each image and repeat in an epoch, `[n * repeats]` each, drawn for all at once."""
        if epoch != self._epoch:
            assert self.recipe is not None
            generator = generator_of(self.seed, epoch)
            n, sides = len(self.pixels) * self.recipe.repeats, 2 * self.recipe.crop_padding + 1
            self._drawn = {
                "top": torch.randint(sides, (n,), generator=generator),
                "left": torch.randint(sides, (n,), generator=generator),
                "flip": torch.rand(n, generator=generator) < self.recipe.hflip,
                "erase": torch.rand(n, generator=generator) < self.recipe.random_erasing,
            }
            self._epoch = epoch
        return self._drawn


def _windows(pixels: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """The window at (top, left), of the image's size, of each image in black padding: `[B, C, H, W]`."""
    b, c, h, w = pixels.shape
    padded = F.pad(pixels, (padding,) * 4)
    rows = (top.view(-1, 1) + torch.arange(h)).view(b, 1, h, 1)
    columns = (left.view(-1, 1) + torch.arange(w)).view(b, 1, 1, w)
    return padded[torch.arange(b).view(b, 1, 1, 1), torch.arange(c).view(1, c, 1, 1), rows, columns]
