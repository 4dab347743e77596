"""Pictures and array files: PNGs, a grid of pictures, and the .npz that image-quality tools read.

Not for where the images come from (`moh.sampling.denoising`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from moh._files import replacing_file


def write_png(path: Path, image: Tensor) -> None:
    """Write an image, `[1 or 3, H, W]` uint8."""
    with replacing_file(path) as file:
        to_pil_image(image).save(file)


def image_grid(images: Tensor, *, columns: int | None = None) -> Tensor:
    """One picture of `[B, C, H, W]` uint8 images, row by row, `[3, H', W']` uint8.

    Args:
        images: the images; grey ones become coloured.
        columns: images in a row; None makes the grid about square.
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    grid: Tensor = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return grid


def write_npz(path: Path, batches: Iterable[tuple[Tensor, Tensor]], *, count: int, shape: tuple[int, int, int]) -> None:
    """Write images and labels as ADM's evaluation suite reads them, one batch in memory at a time.

    `arr_0` is `[count, H, W, 3]` uint8 (grey images become coloured: the suite's network wants three channels), `arr_1`
    the labels, `[count]` int64.

    Args:
        path: the .npz file.
        batches: (images `[B, C, H, W]` uint8, labels `[B]`), read once.
        count: images in all batches together.
        shape: (C, H, W).

    Raises:
        ValueError: the batches hold another number of images.
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
