"""Formats of images: one folder per class, Fashion-MNIST's files (fetched if necessary), Hugging Face data sets.

Files are listed once, on opening, and read on demand; each damaged one raises an `UnreadableImage`.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS

from moh._files import files_below, is_hidden
from moh.data.fetch import apt_download
from moh.data.images.sources import HELDOUT_NAMES, TensorImages, UnreadableImage
from moh.data.text.corpora import default_cache_dir

if TYPE_CHECKING:
    import datasets

FASHION_MNIST = "fashion-mnist"
CLASSES = tuple(FashionMNIST.classes)
MEAN, STD = (0.2860,), (0.3530,)  # of the training images
_PACKAGE = "dataset-fashion-mnist"
_BELOW = Path("usr/share/datasets/fashion-mnist")  # in the package
_PARTS = ("train", "t10k")
_IMAGES, _LABELS = "images-idx3", "labels-idx1"
_PARTS_OF_NAME = re.compile(r"(\d+)")  # text and numbers in turn


class FolderImages:
    """The images of one folder per class, `ROOT/CLASS/**/IMAGE.jpg`, sorted by class (`in_order`) and file name.

    Hidden folders and files (`moh._files.is_hidden`) are left out, with a warning.

    Raises:
        ValueError: there are no class folders, or a class folder (named) has no images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()] if self.root.is_dir() else []
        names = in_order(name for name in folders if not is_hidden(name))
        if not names:
            raise ValueError(f"{root} must hold one folder per class, but it has no folders")
        index = {name: label for label, name in enumerate(names)}
        below = len(os.path.join(root, ""))
        samples = [
            (index[folder[below:].split(os.sep, 1)[0]], os.path.join(folder, name))
            for folder, name in files_below(root, IMG_EXTENSIONS, follow_links=True)
            if len(folder) > below  # not those next to the class folders
        ]
        samples.sort(key=lambda sample: sample[0])  # within a class they are in order
        self.classes = tuple(names)
        self.paths: list[str] = [path for _, path in samples]
        self.labels = torch.tensor([label for label, _ in samples], dtype=torch.int64)
        counts = self.labels.bincount(minlength=len(names))
        empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"class folder {self.root / empty[0]} has no images"
                f"{f', nor have {len(empty) - 1} others' if len(empty) > 1 else ''} (files ending in "
                f"{', '.join(IMG_EXTENSIONS)})"
            )

    def image(self, index: int) -> Image.Image:
        path = Path(self.paths[index])
        try:
            return decode(path.read_bytes())
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror or error}") from None
        except UnreadableImage as error:
            raise UnreadableImage(f"{path}: {error}") from None

    def name(self, index: int) -> str:
        return self.paths[index]


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Pillow's names of the formats that are read; others have decoders that are rarely used, and EPS starts a program."""
MAX_PIXELS = 8192 * 8192
"""Pixels of the largest image that is decoded, 200 MB in colour: a few kB of PNG can claim any size."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels, as timm numbers them: "2" before "10", "a2" before "a10".

    A model without label names knows its classes by this order alone.
    """

    def key(name: str) -> tuple[list[str | int], str]:
        return [int(part) if part.isdecimal() else part for part in _PARTS_OF_NAME.split(name.lower())], name

    return sorted(names, key=key)


def decode(data: bytes) -> Image.Image:
    """The image in a file's bytes, fully decoded; every image that comes from a file is read with this.

    Raises:
        UnreadableImage: the file is damaged, of none of the `FORMATS`, larger than `MAX_PIXELS`, or has more than 8 bits
            per channel.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
    except UnreadableImage:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow would clip them to white
        raise UnreadableImage(f"its pixels have more than 8 bits (mode {image.mode})")
    return image


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, size x size, as in ADM's and the published preparation of ImageNet.

    The image is halved, by means of 2 x 2 pixels, while its shorter side is at least twice `size`; then the shorter side is
    resized to `size`, bicubic. Pillow's bicubic filter alone gives other pixels for large images, and so another FID.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_fashion_mnist(cache_dir: str | Path | None = None) -> tuple[TensorImages, TensorImages]:
    """`(train, test)`: 60,000 + 10,000 grey images of 28x28 pixels, fetched into `cache_dir` if necessary.

    Looks in /usr/share/datasets/fashion-mnist and in the cache; then fetches with `apt-get download` (no root needed) or,
    if that fails, with torchvision.

    Raises:
        RuntimeError: the data set is not on this machine and can't be fetched.
        ValueError: a file is damaged; names it.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    for folder in (Path("/") / _BELOW, cache / _PACKAGE / _BELOW, cache / "FashionMNIST" / "raw"):
        if has_idx_files(folder):
            return read_idx_folder(folder)
    return read_idx_folder(_fetch(cache))


def has_idx_files(folder: Path) -> bool:
    """Whether a folder has all four files, compressed or not."""
    return all(_file(folder, part, kind) is not None for part in _PARTS for kind in (_IMAGES, _LABELS))


def read_idx_folder(folder: Path) -> tuple[TensorImages, TensorImages]:
    """`(train, test)` of a folder with the four files.

    Raises:
        ValueError: a file is missing or damaged; names it.
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
        raise ValueError(f"{path} is damaged: not an IDX file of {dims}-dimensional bytes, or not as long as it states")
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


class HubImages:
    """One split of a Hugging Face data set; images are decoded here, so that damaged ones are skipped as in a folder.

    Args:
        rows: the split.
        image_column: None takes the one that holds images.
        label_column: None takes the one that holds class labels, else `label`.

    Raises:
        ValueError: a column is missing (lists them), the image column holds no images, or a row has no class.
    """

    def __init__(
        self, rows: datasets.Dataset, *, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        import datasets

        features = rows.features
        image = _column(features, image_column, datasets.Image, ("image", "img"), "data.image_column")
        label = _column(features, label_column, datasets.ClassLabel, ("label", "labels"), "data.label_column")
        if not isinstance(features[image], datasets.Image):
            raise ValueError(f"data.image_column {image!r} must hold images, but holds {features[image]}")
        values = rows.with_format("arrow")[:][label].to_pylist()
        if any(value is None for value in values):
            raise ValueError(f"data.label_column {label!r} must have a label in every row, but some are missing")
        if isinstance(features[label], datasets.ClassLabel):
            self.classes = tuple(features[label].names)
            self.labels: Tensor = torch.tensor(values, dtype=torch.int64)
            if len(values) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
                raise ValueError(f"data.label_column {label!r} must have a class in every row, but some are outside")
        else:
            found = set(values)
            names = in_order(found) if all(isinstance(value, str) for value in found) else sorted(found)
            self.classes = tuple(map(str, names))
            places = {name: place for place, name in enumerate(names)}
            self.labels = torch.tensor([places[value] for value in values], dtype=torch.int64)
        self._rows = rows.cast_column(image, datasets.Image(decode=False))
        self._image = image

    def image(self, index: int) -> Image.Image:
        cell = self._rows[index][self._image]
        try:
            if cell is None or (cell["bytes"] is None and cell["path"] is None):
                raise UnreadableImage("the image is missing")
            return decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes())
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        return f"row {index}"


def load_splits(name: str, train_split: str | None, eval_split: str | None) -> tuple[Any, Any]:
    """`(train, heldout)` rows of a Hugging Face data set, from the hub or from disk (`save_to_disk`, or Parquet files).

    `heldout` is None if there is no such split.

    Raises:
        ValueError: the data set can't be loaded, or lacks a requested split; lists the existing ones.
    """
    import datasets

    try:
        local = Path(name).expanduser()
        saved = any((local / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))
        source = str(local) if local.is_dir() else name
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.dataset {name!r} can't be loaded: {' '.join(str(error).split())}") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    train = train_split or "train"
    heldout = eval_split or next((split for split in HELDOUT_NAMES if split in splits and split != train), None)
    for field, split in (("train_split", train), ("eval_split", heldout)):
        if split is not None and split not in splits:
            raise ValueError(f"data.{field} {split!r} is not among the splits of {name}: {', '.join(splits)}")
    return splits[train], None if heldout is None else splits[heldout]


def _column(features: Any, asked: str | None, kind: type, usual: tuple[str, ...], field: str) -> str:
    listed = ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{field} {asked!r} is not among the columns: {listed}")
        return asked
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found if len(found) == 1 else [name for name in usual if name in features and (not found or name in found)]
    if not found:
        raise ValueError(f"{field} must be given: which of the columns is it? {listed}")
    return found[0]
