"""Fashion-MNIST, 60,000 + 10,000 labelled grey images of 28x28 pixels: where it lies, fetching it, reading it.

A local copy is looked for first; Debian's package `dataset-fashion-mnist` and torchvision's download come after it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from moh.training._sources import apt_download
from moh.training.corpus import default_cache_dir
from moh.training.images.sources import TensorImages

NAME = "fashion-mnist"
CLASSES = tuple(FashionMNIST.classes)
MEAN, STD = (0.2860,), (0.3530,)  # of the training images
_PACKAGE = "dataset-fashion-mnist"
_BELOW = Path("usr/share/datasets/fashion-mnist")  # in that package
_PARTS = ("train", "t10k")
_IMAGES, _LABELS = "images-idx3", "labels-idx1"


def load_fashion_mnist(cache_dir: str | Path | None = None) -> tuple[TensorImages, TensorImages]:
    """`(train, test)`, read from this machine or fetched into `cache_dir` first.

    Looked for in /usr/share/datasets/fashion-mnist and in the cache; then fetched with `apt-get download` (no root
    needed), and where that fails by torchvision.

    Raises:
        RuntimeError: it is not here and can't be fetched.
        ValueError: a file is damaged; names it.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    for folder in (Path("/") / _BELOW, cache / _PACKAGE / _BELOW, cache / "FashionMNIST" / "raw"):
        if has_idx_files(folder):
            return read_idx_folder(folder)
    return read_idx_folder(_fetch(cache))


def has_idx_files(folder: Path) -> bool:
    """Whether all four files are there, compressed or not."""
    return all(_file(folder, part, kind) is not None for part in _PARTS for kind in (_IMAGES, _LABELS))


def read_idx_folder(folder: Path) -> tuple[TensorImages, TensorImages]:
    """`(train, test)` of a folder with the four files.

    Raises:
        ValueError: one is missing or damaged; names it.
    """
    train, test = (
        TensorImages(
            _read(folder, part, _IMAGES, 3)[:, None], _read(folder, part, _LABELS, 1), CLASSES, mean=MEAN, std=STD
        )
        for part in _PARTS
    )
    return train, test


def _file(folder: Path, part: str, kind: str) -> Path | None:
    for suffix in ("", ".gz"):
        path = folder / f"{part}-{kind}-ubyte{suffix}"
        if path.is_file():
            return path
    return None


def _read(folder: Path, part: str, kind: str, dims: int) -> Tensor:
    """One IDX file of bytes: two zeros, the type (8: bytes), the number of dimensions, their sizes, the data."""
    path = _file(folder, part, kind)
    if path is None:
        raise ValueError(f"{folder} has no {part}-{kind}-ubyte[.gz]")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dims}I", data)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    begin = 4 * (1 + dims)
    if magic != 0x800 + dims or len(data) - begin != math.prod(shape):
        raise ValueError(f"{path} is damaged: it is no IDX file of {dims}-dimensional bytes of the length it says")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)


def _fetch(cache: Path) -> Path:
    advice = "torchvision's download is tried instead"
    try:
        apt_download(_PACKAGE, cache / _PACKAGE, advice=advice)
        return cache / _PACKAGE / _BELOW
    except RuntimeError as error:
        from_debian = str(error).removesuffix(f"; {advice}")
    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Fashion-MNIST is neither in /{_BELOW} nor in {cache}; {from_debian}; torchvision: {error}"
        ) from None
    return cache / "FashionMNIST" / "raw"
