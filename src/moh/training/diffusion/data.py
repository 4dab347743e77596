"""Training images as tensors of one size, a batch at a time, each with its index, which seeds its noise."""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from moh.data.images.datasets import load_training_images
from moh.data.images.formats import FolderImages, middle_square
from moh.data.images.recipe import ImageDataRecipe
from moh.data.images.sources import ImageSource, TensorImages, UnreadableImage, next_readable
from moh.training.diffusion.recipe import DiffusionDataRecipe

Batch = dict[str, Tensor]


class PixelDataset(Dataset[Batch]):
    """The images of a source as uint8 tensors.

    Images in files become RGB, resized and cropped to their `middle_square`. Images in memory keep their number of channels;
    larger ones are resized (bicubic, antialiased) and cropped, and a black margin fills smaller ones.

    Args:
        source: labelled images.
        image_size: height and width of the tensors.
    """

    def __init__(self, source: ImageSource, image_size: int) -> None:
        self.source = source
        self.image_size = image_size
        self.labels = source.labels
        self.classes = tuple(source.classes)
        self._pixels = _resized(source.pixels, image_size) if isinstance(source, TensorImages) else None
        self.sample_shape = (3 if self._pixels is None else self._pixels.shape[1], image_size, image_size)
        # Shared with the loading processes, so that each damaged image is reported once
        self._damaged: Tensor = torch.zeros(len(source.labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: list[int]) -> Tensor:
        """`[len(indices), C, H, W]` uint8.

        Raises:
            UnreadableImage: an image is damaged; names it.
        """
        if self._pixels is not None:
            return self._pixels[indices]
        return torch.stack([self._fitted(self.source.image(index)) for index in indices])

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch: `pixels` `[B, C, H, W]` uint8, `labels` and `indices` `[B]`.

        A damaged image is replaced with the next readable one and its label.

        Warns:
            UserWarning: an image is damaged; names it, once.

        Raises:
            RuntimeError: a hundred consecutive images are damaged, or all of them.
        """
        if self._pixels is not None:
            pixels, places = self._pixels[indices], indices
        else:
            read = [next_readable(self.source, index, self._note) for index in indices]
            pixels, places = torch.stack([self._fitted(image) for image, _ in read]), [place for _, place in read]
        return {"pixels": pixels, "labels": self.labels[places], "indices": torch.tensor(indices)}

    @cached_property
    def digest(self) -> str:
        """Identifies the images: a hash of classes, labels and, for images in memory, all pixels; for others, of the names,
        the sizes of files in folders, the pixels of about eight images, and how files are cropped and resized."""
        digest = hashlib.sha256(json.dumps([self.classes, len(self)]).encode())
        digest.update(self.labels.numpy().tobytes())
        if isinstance(self.source, TensorImages):
            digest.update(self.source.pixels.contiguous().numpy().data)
            return digest.hexdigest()[:16]
        for index in range(len(self)):
            name = Path(self.source.name(index))
            size = _file_size(name) if isinstance(self.source, FolderImages) else None
            digest.update(json.dumps([name.parts[-2:], size]).encode())
        for index in range(0, len(self), max(1, len(self) // 8)):
            try:
                digest.update(self._fitted(self.source.image(index)).numpy().tobytes())
            except UnreadableImage:
                digest.update(b"damaged")
        # Those images may be of the size already, so that another way to prepare images wouldn't show in them
        digest.update(self._fitted(_probe(self.image_size)).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _note(self, place: int, error: UnreadableImage) -> None:
        if not self._damaged[place]:
            self._damaged[place] = True
            warnings.warn(f"replaced by the next image: {error}", stacklevel=2)

    def _fitted(self, image: Image.Image) -> Tensor:
        pixels: Tensor = F.pil_to_tensor(middle_square(image.convert("RGB"), self.image_size))
        return pixels


def load_source(data: DiffusionDataRecipe) -> ImageSource:
    """The training images of a recipe.

    Raises:
        ValueError, RuntimeError: as `moh.data.images.datasets.load_training_images`.
    """
    fields = ("dataset", "train_split", "image_column", "label_column", "cache_dir")
    return load_training_images(ImageDataRecipe(**{name: getattr(data, name) for name in fields}))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in -1..1."""
    return pixels.float() / 127.5 - 1


def _probe(size: int) -> Image.Image:
    """An image that every step of the preparation changes: more than four times `size`, not square, of irregular pixels."""
    height, width = 4 * size + 3, 6 * size + 5
    pixels = torch.arange(3 * height * width, dtype=torch.int64) * 2_654_435_761 // 65_536 % 256
    probe: Image.Image = F.to_pil_image(pixels.to(torch.uint8).reshape(3, height, width))
    return probe


def _file_size(file: Path) -> int:
    """In bytes; -1 if the file is missing."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


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
