"""Training images as tensors of one size, a batch at a time, each with its number, from which its noise is drawn.

Not for finding images (`moh.training.images.datasets`), nor for latents (`moh.training.diffusion.latents`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moh._extras import require
from moh.training.diffusion.recipe import DiffusionDataRecipe
from moh.training.images.datasets import load_images
from moh.training.images.recipe import ImageDataRecipe
from moh.training.images.sources import ImageSource, TensorImages

require("torchvision", extra="diffusion")

from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms import functional as F  # noqa: E402

Batch = dict[str, Tensor]


class PixelDataset(Dataset[Batch]):
    """The images of a source as uint8 tensors.

    A larger image is resized (bicubic, antialiased) and cropped to the middle square. Grey images that lie in memory
    keep their one channel, all others become RGB; those in memory that are smaller than `image_size` get a black margin.

    Args:
        source: labelled images.
        image_size: height and width that the tensors get.
    """

    def __init__(self, source: ImageSource, image_size: int) -> None:
        self.source = source
        self.image_size = image_size
        self.labels = source.labels
        self.classes = tuple(source.classes)
        self._pixels = _resized(source.pixels, image_size) if isinstance(source, TensorImages) else None
        self.sample_shape = (3 if self._pixels is None else self._pixels.shape[1], image_size, image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: list[int]) -> Tensor:
        """`[len(indices), C, H, W]` uint8.

        Raises:
            UnreadableImage: one of them is damaged; names it.
        """
        if self._pixels is not None:
            return self._pixels[indices]
        return torch.stack([self._read(index) for index in indices])

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch: `pixels` `[B, C, H, W]` uint8, `labels` and `indices` `[B]`."""
        return {
            "pixels": self.pixels(indices),
            "labels": self.labels[indices],
            "indices": torch.tensor(indices),
        }

    def _read(self, index: int) -> Tensor:
        image = self.source.image(index).convert("RGB")
        image = F.resize(image, self.image_size, interpolation=InterpolationMode.BICUBIC)
        pixels: Tensor = F.pil_to_tensor(F.center_crop(image, [self.image_size, self.image_size]))
        return pixels


def load_source(data: DiffusionDataRecipe) -> ImageSource:
    """The training images of a recipe.

    Raises:
        ValueError, RuntimeError: as `moh.training.images.datasets.load_images`.
    """
    fields = ("dataset", "train_split", "image_column", "label_column", "cache_dir")
    return load_images(ImageDataRecipe(**{name: getattr(data, name) for name in fields}))[0]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in -1..1."""
    return pixels.float() / 127.5 - 1


def as_batch(batch: Any) -> Any:
    """The collate function of data sets that give whole batches."""
    return batch


def _resized(pixels: Tensor, size: int) -> Tensor:
    """`[n, C, size, size]` uint8."""
    height, width = pixels.shape[2:]
    resized: Tensor
    if max(height, width) <= size:
        left, top = (size - width) // 2, (size - height) // 2
        resized = F.pad(pixels, [left, top, size - width - left, size - height - top])
    else:
        resized = F.resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    resized = F.center_crop(resized, [size, size])
    return resized
