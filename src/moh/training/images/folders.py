"""Images in one folder per class, as torchvision's `ImageFolder` has them: `ROOT/CLASS/**/IMAGE.jpg`.

Files are listed once, at opening; they are read when they are needed.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from moh.training.images.sources import UnreadableImage


class FolderImages:
    """The images below `root`, sorted by class and file name.

    Raises:
        ValueError: there are no class folders, or one of them has no images; names it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            names, index = find_classes(str(root))
        except FileNotFoundError:
            raise ValueError(f"{root} must hold one folder per class, but it has no folders") from None
        samples = make_dataset(str(root), index, extensions=IMG_EXTENSIONS, allow_empty=True)
        self.classes = tuple(names)
        self.paths: list[str] = [path for path, _ in samples]
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
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


def decode(data: bytes) -> Image.Image:
    """The image in a file's bytes, all of it decoded.

    Raises:
        UnreadableImage: it is damaged, or no image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow would clip them to white
        raise UnreadableImage(f"its pixels have more than 8 bits (mode {image.mode})")
    return image
