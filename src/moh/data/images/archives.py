"""Images in tar files, read in place by timm: `CLASS/IMAGE.jpg` in one file, one file per class, or tar files in a tar file.

ImageNet's `ILSVRC2012_img_train.tar` is of the last kind. Nothing is unpacked on the disk.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from timm.data.readers import img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets.folder import IMG_EXTENSIONS

from moh._files import is_hidden
from moh.data.images.formats import decode, in_order
from moh.data.images.sources import HELDOUT_NAMES, UnreadableImage

_SAMPLE_FILES = 20  # in which the first sample of a WebDataset is complete


class TarImages:
    """The images of a tar file, or of a directory's tar files; the class is the last folder, or the file, that holds an image.

    Classes are numbered as in a directory of class folders (`in_order`). Hidden files, such as macOS's `._IMAGE.jpg`, are
    left out.

    Args:
        path: file or directory.

    Raises:
        ValueError: a file is damaged or compressed, or there are no images or no classes, or both train/ and val/.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with _extensions(IMG_EXTENSIONS):
                # No open files: processes that are forked later would share their positions. No file next to the data.
                reader: Any = ReaderImageInTar  # timm has no types here
                self._reader = reader(str(path), cache_tarfiles=False, cache_tarinfo=False)
        except tarfile.TarError as error:
            raise ValueError(f"{path} must be an uncompressed, whole tar file or hold only such: {error}") from None
        except ValueError:  # timm takes apart an empty list
            raise ValueError(f"{path} holds no images (files ending in {', '.join(IMG_EXTENSIONS)})") from None
        names = [PurePosixPath(member.path) for member, *_ in self._reader.samples]
        parts = {part for name in names for part in name.parts[:-2]}
        if "train" in parts and (both := [name for name in HELDOUT_NAMES if name in parts]):
            raise ValueError(
                f"{path} must not hold both train/ and {both[0]}/: give a directory with a tar file of each"
            )
        kept = [index for index, name in enumerate(names) if not any(map(is_hidden, name.parts))]
        found = [self._reader.class_idx_to_name[self._reader.targets[index]] for index in kept]
        if not kept or "" in found or "." in found:
            raise ValueError(f"{path} must hold images in one folder per class, such as CLASS/IMAGE.jpg")
        self.classes = tuple(in_order(set(found)))
        number = {name: label for label, name in enumerate(self.classes)}
        labels = torch.tensor([number[name] for name in found], dtype=torch.int64)
        order = labels.argsort(stable=True)  # sorted by class, as folders are
        self.labels = labels[order]
        self._places = torch.tensor(kept)[order]

    def image(self, index: int) -> Image.Image:
        try:
            file, _ = self._reader[int(self._places[index])]
            with file:
                return decode(file.read())
        except (OSError, tarfile.TarError, UnreadableImage) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        member, parent, child = self._reader.samples[int(self._places[index])]
        return "/".join([str(self.path), *([parent] if parent else []), *([child.name] if child else []), member.name])


def has_tar_files(path: Path) -> bool:
    """Whether it is a tar file, or a directory of such and no folders."""
    if path.is_dir():
        return any(path.glob("*.tar")) and not any(
            entry.is_dir() and not is_hidden(entry.name) for entry in path.iterdir()
        )
    return path.is_file() and path.suffix.lower() == ".tar"


def is_web_dataset(path: Path) -> bool:
    """Whether the first sample of the (first) tar file has a class in a file of its own, `KEY.cls` next to `KEY.jpg`."""
    first = min(path.glob("*.tar")) if path.is_dir() else path
    try:
        with tarfile.open(first) as tar:
            names = [member.name for member, _ in zip(tar, range(_SAMPLE_FILES), strict=False)]
    except tarfile.TarError:
        return False  # which `TarImages` reports
    return any(name.endswith(".cls") for name in names)


def open_web_dataset(path: Path, *, cache_dir: str | None) -> dict[str, Any]:
    """The splits of a WebDataset, by `datasets`, which writes them to its cache once: "train", and others by file name.

    The files of a split have names that begin with it, such as `val-000.tar`; all others are "train".

    Raises:
        ValueError: a file is damaged, or its samples differ in their parts.
    """
    import datasets

    splits: dict[str, list[str]] = {}
    for file in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        name = next((name for name in HELDOUT_NAMES if file.stem.startswith(name)), "train")
        splits.setdefault(name, []).append(str(file))
    folder = None if cache_dir is None else str(Path(cache_dir) / "webdataset")
    try:
        found: dict[str, Any] = datasets.load_dataset("webdataset", data_files=splits, cache_dir=folder)
    except (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} is not a whole WebDataset: {' '.join(str(cause).split())}") from None
    return found


def tar_parts(path: Path) -> list[str]:
    """Which of train.tar, val.tar and so on a directory holds, if these are all of its tar files."""
    found = {file.stem for file in path.glob("*.tar")} if path.is_dir() else set()
    return [name for name in ("train", *HELDOUT_NAMES) if name in found] if found <= {"train", *HELDOUT_NAMES} else []


@contextmanager
def _extensions(wanted: tuple[str, ...]) -> Iterator[None]:
    """timm's reader takes the endings of image files from a global, which is as before after the block."""
    extensions: Any = img_extensions
    before = extensions.get_img_extensions()
    extensions.set_img_extensions(wanted)
    try:
        yield
    finally:
        extensions.set_img_extensions(before)
