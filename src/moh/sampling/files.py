"""Many images on disk: several processes share the work, and an interrupted run resumes where it stopped.

Every batch is written as a part; from all parts the first process makes PNGs, a grid and an array file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from moh._files import replacing_file
from moh.sampling.checkpoint import ImageModel
from moh.sampling.denoising import sample_batches
from moh.sampling.schedulers import SamplingSettings

_GRID = 100  # most images in the grid
_OWN = re.compile(r"(\d{5}|[1-9]\d{5,})-\w*\.png")  # the names of the images


def sample_to_files(
    model: ImageModel,
    labels: Sequence[int],
    settings: SamplingSettings,
    *,
    out: Path | None = None,
    npz: Path | None = None,
    batch_size: int = 64,
) -> None:
    """Draw image i of class `labels[i]` for every i and write them; under `torchrun` the processes share the work.

    Until all is done the batches are kept in a directory `.moh-parts` in `out`, or next to `npz`, from which the same
    call resumes after an interruption, with any batch size and number of processes.

    Args:
        model: as `load_image_model` reads it.
        labels: the class of each image.
        settings: how to draw.
        out: directory, created if missing, for `grid.png` with the first hundred and a PNG of each in images/; these
            replace the images of an earlier call, which is recognised by its `grid.png`.
        npz: file for all images as arrays (`write_npz`).
        batch_size: images at a time per process.

    Raises:
        ValueError: neither `out` nor `npz` is given, there are no labels, a class is out of range, or there are parts
            of another run or, in images/, foreign files.
        RuntimeError: the model returned NaN or infinity.
    """
    if npz is not None and npz.suffix != ".npz":
        raise ValueError(f"npz must be a file that ends in .npz, got {npz}")
    if out is not None:
        folder = out / ".moh-parts"
    elif npz is not None:
        folder = npz.with_name(f".{npz.name}.moh-parts")
    else:
        raise ValueError("out or npz must be given, got neither")
    if not labels:
        raise ValueError("labels must have at least one entry")
    model.check_classes(labels)
    if out is not None:
        _check_own(out)
    state = PartialState()
    dtype = next(model.transformer.parameters()).dtype
    parts = _Parts(folder, [model.digest(), str(dtype), list(labels), asdict(settings)])
    todo = parts.missing(len(labels))
    state.wait_for_everyone()  # all have read the parts before one writes its own
    mine = _share(todo, batch_size, state.process_index, state.num_processes)
    total = sum(map(len, mine))
    with tqdm(total=total, desc="images", unit="image", disable=None if state.is_main_process else True) as bar:
        for indices in mine:
            batch = [labels[i] for i in indices]
            for _, images in sample_batches(model, batch, settings, indices=indices, batch_size=batch_size):
                parts.write(indices, images)
                bar.update(len(indices))
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(parts, labels, out, npz, model.class_names)
    state.wait_for_everyone()


class _Parts:
    """The finished batches, as safetensors files named by their first image and the one after their last."""

    def __init__(self, folder: Path, identity: list[object]) -> None:
        self.folder = folder
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, indices: range, images: Tensor) -> None:
        with replacing_file(self.folder / f"{indices.start:08d}-{indices.stop:08d}.safetensors") as file:
            save_file({"images": images.contiguous()}, file, metadata={"identity": self.identity})

    def missing(self, count: int) -> list[int]:
        """The images of `range(count)` that no part holds, in order.

        Raises:
            ValueError: a part can't be read or is of another run.
        """
        done: set[int] = set()
        for file, indices in self._files():
            try:
                with safe_open(file, framework="pt") as part:
                    identity = (part.metadata() or {}).get("identity")
            except SafetensorError as error:
                raise ValueError(f"{file} can't be read ({error}): delete it") from None
            if identity != self.identity:
                raise ValueError(
                    f"{self.folder} holds parts of another run (another model, classes, seed or settings): finish that "
                    "run, or delete the directory"
                )
            done.update(indices)
        return [i for i in range(count) if i not in done]

    def read(self, stop: int | None = None) -> Iterator[tuple[range, Tensor]]:
        """Yields (indices, images) of every part, or of those that begin before image `stop`, in order."""
        for file, indices in self._files():
            if stop is not None and indices.start >= stop:
                return
            with safe_open(file, framework="pt") as part:
                yield indices, part.get_tensor("images")

    def _files(self) -> list[tuple[Path, range]]:
        found = []
        for file in sorted(self.folder.glob("*.safetensors")):
            first, last = file.stem.split("-")
            found.append((file, range(int(first), int(last))))
        return found


def _share(todo: list[int], batch_size: int, process: int, processes: int) -> list[range]:
    """The batches of one process: runs of consecutive images, about the same number for every process."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = min(batch_size, max(1, -(-len(todo) // processes)))  # few images are divided among all processes
    batches: list[range] = []
    for i in todo:
        if batches and batches[-1].stop == i and len(batches[-1]) < size:
            batches[-1] = range(batches[-1].start, i + 1)
        else:
            batches.append(range(i, i + 1))
    return batches[process::processes]


def _finish(
    parts: _Parts, labels: Sequence[int], out: Path | None, npz: Path | None, class_names: Sequence[str]
) -> None:
    """Make the files from the parts, then delete the parts."""
    if npz is not None:
        npz.parent.mkdir(parents=True, exist_ok=True)
        shape = tuple(next(parts.read())[1].shape[1:])
        batches = ((images, torch.tensor([labels[i] for i in indices])) for indices, images in parts.read())
        write_npz(npz, batches, count=len(labels), shape=shape)  # type: ignore[arg-type]
    if out is not None:
        first = [images for _, images in parts.read(stop=_GRID)]
        write_png(out / "grid.png", image_grid(torch.cat(first)[:_GRID]))  # written first: it marks images/ as ours
        (out / "images").mkdir(exist_ok=True)
        for earlier in (out / "images").iterdir():
            if _OWN.fullmatch(earlier.name):
                earlier.unlink()
        for indices, images in parts.read():
            for i, image in zip(indices, images, strict=True):
                write_png(out / "images" / f"{i:05d}-{_file_name(labels[i], class_names)}.png", image)
    shutil.rmtree(parts.folder)


def _check_own(out: Path) -> None:
    """Raise a ValueError if `out / "images"` holds files, but no earlier call left its grid in `out`."""
    images = out / "images"
    if not (out / "grid.png").exists() and images.is_dir() and any(images.iterdir()):
        raise ValueError(
            f"out must be a new directory or that of an earlier call, but {images} holds files and there is no "
            "grid.png next to it"
        )


def _file_name(label: int, class_names: Sequence[str]) -> str:
    """File name part for the class."""
    name = class_names[label].split(",")[0] if label < len(class_names) else str(label)
    return "".join(c if c.isalnum() else "_" for c in name)


def write_png(path: Path, image: Tensor) -> None:
    """Write an image, `[1 or 3, H, W]` uint8."""
    with replacing_file(path) as file:
        to_pil_image(image).save(file)


def image_grid(images: Tensor, *, columns: int | None = None) -> Tensor:
    """One picture of `[B, C, H, W]` uint8 images, row by row, `[3, H', W']` uint8.

    Args:
        images: grey ones become coloured.
        columns: images per row; None makes the grid about square.
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    grid: Tensor = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return grid


def write_npz(path: Path, batches: Iterable[tuple[Tensor, Tensor]], *, count: int, shape: tuple[int, int, int]) -> None:
    """Write images and labels as ADM's evaluation suite reads them, one batch in memory at a time.

    `arr_0` is `[count, H, W, 3]` uint8 (grey images become coloured: the suite's network takes three channels), `arr_1`
    the labels, `[count]` int64.

    Args:
        path: the .npz file.
        batches: (images `[B, C, H, W]` uint8, labels `[B]`), read once.
        count: images in all batches together.
        shape: (C, H, W).

    Raises:
        ValueError: the batches do not hold `count` images.
    """
    _, height, width = shape
    labels: list[Tensor] = []
    with replacing_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
            for images, classes in batches:
                coloured = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # [B, H, W, 3]
                stream.write(coloured.contiguous().numpy().tobytes())
                labels.append(classes)
        written = sum(map(len, labels))
        if written != count:
            raise ValueError(f"count must be the number of images, {written}, got {count}")
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, torch.cat(labels).to(torch.int64).numpy())
