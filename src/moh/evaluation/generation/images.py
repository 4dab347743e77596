"""Images to score, from a directory, an `.npz` file or a torch Dataset: one at a time, as uint8, never all in memory.

Nothing is augmented or normalised here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from moh._files import files_below
from moh.data.images.formats import MAX_PIXELS, decode, middle_square
from moh.data.images.sources import UnreadableImage

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageDataset(Protocol):
    """A map-style torch Dataset (or a tensor `[n, C, H, W]`) of images, or of tuples that begin with one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Images:
    """A source of images that can be read repeatedly, in the same order.

    Attributes:
        name: the source, for messages.
        count: number of images.
        read: starts reading; yields (name of the image, uint8 `[C, H, W]`).
    """

    name: str
    count: int
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 `[B, C, H, W]` of at most `size` images each.

        Raises:
            ValueError: an image can't be read, or differs from the first in height or width.
        """
        batch: list[Tensor] = []
        first: tuple[str, torch.Size] | None = None
        for name, image in self.read():
            first = first or (name, image.shape)
            if image.shape != first[1]:
                raise ValueError(
                    f"{self.name}: all images must have one size, but {first[0]} is {_size(first[1])} and {name} is "
                    f"{_size(image.shape)}; give a size to crop and resize them to"
                )
            batch.append(image)
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


def open_images(source: str | Path | ImageDataset, *, channels: int = 3, size: int | None = None) -> Images:
    """Open a source of images.

    Args:
        source: a directory (with its subdirectories, in order of the files' paths, without hidden ones and the `grid.png`
            that `moh sample` writes), an `.npz` file with `arr_0` `[n, H, W, C]` or `[n, H, W]` uint8 as the ADM evaluation
            suite reads it, or a Dataset of PIL images or uint8 tensors `[C, H, W]`, alone or first in a tuple.
        channels: 3 or 1; grey images are converted to colour and vice versa.
        size: make the middle square of each image size x size, as training does (`middle_square`); None leaves them unchanged.

    Raises:
        ValueError: the source does not exist, holds no images, or images of another dtype or shape.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not isinstance(source, str | Path):
        images = Images(type(source).__name__, len(source), lambda: _dataset(source, channels, size))
    elif Path(source).is_dir():
        found = {file for folder, name in files_below(source, _SUFFIXES) if (file := Path(folder, name)).is_file()}
        files = sorted(found - {Path(source) / "grid.png"})
        images = Images(str(source), len(files), lambda: _files(files, channels, size))
    elif Path(source).is_file() and Path(source).suffix == ".npz":
        path = Path(source)
        images = Images(str(source), _npz_shape(path)[0], lambda: _npz(path, channels, size))
    else:
        what = "another file" if Path(source).is_file() else "not there"
        raise ValueError(f"images must be a directory, an .npz file or a Dataset, but {str(source)!r} is {what}")
    if images.count == 0:
        raise ValueError(f"{images.name} holds no images ({', '.join(_SUFFIXES)})")
    return images


def _files(files: list[Path], channels: int, size: int | None) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            image = decode(file.read_bytes())
        except (OSError, UnreadableImage) as error:
            raise ValueError(f"{file} can't be read as an image: {error}") from None
        yield file.name, _from_pil(image, channels, size)


def _dataset(dataset: ImageDataset, channels: int, size: int | None) -> Iterator[tuple[str, Tensor]]:
    for index in range(len(dataset)):
        item = dataset[index]
        image = item[0] if isinstance(item, tuple | list) and item else item
        if isinstance(image, Image.Image):
            yield f"image {index}", _from_pil(image, channels, size)
        elif isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3):
            yield f"image {index}", _from_tensor(image, channels, size)
        else:
            kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"images must be PIL images or uint8 tensors [1 or 3, H, W] of 0 to 255, but image {index} is {kind}"
            )


def _npz(path: Path, channels: int, size: int | None) -> Iterator[tuple[str, Tensor]]:
    n, height, width, depth = _npz_shape(path)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        _npy_header(file)
        for index in range(n):
            data = bytearray(file.read(height * width * depth))
            if len(data) != height * width * depth:
                raise ValueError(f"{path} is cut off at image {index} of {n}")
            image = torch.frombuffer(data, dtype=torch.uint8).view(height, width, depth).permute(2, 0, 1)
            yield f"image {index}", _from_tensor(image, channels, size)


def _npz_shape(path: Path) -> tuple[int, int, int, int]:
    """(n, H, W, C) of `arr_0`, from the header only."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran_order, dtype = _npy_header(file)
    except KeyError:
        raise ValueError(f"{path} holds no images: it has no array arr_0") from None
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as an .npz file: {error}") from None
    full = (*shape, 1) if len(shape) == 3 else shape
    if dtype != np.uint8 or fortran_order or len(full) != 4 or full[3] not in (1, 3) or 0 in full[1:]:
        raise ValueError(f"arr_0 of {path} must be uint8 [n, H, W, 1 or 3] or [n, H, W], got {dtype} {shape}")
    n, height, width, depth = full
    if height * width > MAX_PIXELS:
        raise ValueError(f"{path} holds images of {width} x {height} pixels, more than {MAX_PIXELS}")
    return n, height, width, depth


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"arr_0 is of the unknown format version {version}")
    return readers[version](file)


def _from_tensor(image: Tensor, channels: int, size: int | None) -> Tensor:
    if len(image) == channels and (size is None or image.shape[1:] == (size, size)):
        return image
    return _from_pil(to_pil_image(image), channels, size)


def _from_pil(image: Image.Image, channels: int, size: int | None) -> Tensor:
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != (size, size):
        image = middle_square(image, size)
    tensor: Tensor = pil_to_tensor(image)  # [C, H, W], uint8
    return tensor


def _size(shape: torch.Size) -> str:
    return f"{shape[-2]}x{shape[-1]}"
