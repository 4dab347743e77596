"""Promise: a directory, an .npz file and a Dataset give the same images in order; the rest is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from generation_cases import random_images, write_npz, write_pngs
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import to_pil_image

from moh.evaluation.generation import open_images


def read(source, **options) -> torch.Tensor:
    images = open_images(source, **options)
    batches = list(images.batches(3))
    assert sum(map(len, batches)) == images.count
    return torch.cat(batches)


@pytest.mark.parametrize("kind", ["directory", "npz", "tensor", "tensors-with-labels", "pil-with-labels"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_every_source_gives_the_same_images(tmp_path: Path, kind: str, channels: int) -> None:
    images = random_images(7, seed=1, channels=channels, height=4, width=6)
    source = {
        "directory": lambda: write_pngs(tmp_path / "images", images),
        "npz": lambda: write_npz(tmp_path / "images.npz", images),
        "tensor": lambda: images,
        "tensors-with-labels": lambda: TensorDataset(images, torch.arange(7)),
        "pil-with-labels": lambda: [(to_pil_image(image), 0) for image in images],
    }[kind]()
    found = read(source, channels=channels)
    assert found.dtype == torch.uint8
    assert torch.equal(found, images)
    assert torch.equal(read(source, channels=channels), images)  # again, from the start


@pytest.mark.parametrize("kind", ["directory", "npz", "tensor"])
def test_grey_images_serve_as_colour_ones_and_back(tmp_path: Path, kind: str) -> None:
    grey = random_images(5, seed=2, channels=1)
    make = {"directory": lambda x: write_pngs(tmp_path / f"{x.shape[1]}", x), "tensor": lambda x: x}
    make["npz"] = lambda x: write_npz(tmp_path / f"{x.shape[1]}.npz", x)
    assert torch.equal(read(make[kind](grey)), grey.expand(-1, 3, -1, -1))
    assert torch.equal(read(make[kind](grey.expand(-1, 3, -1, -1)), channels=1), grey)


def test_an_npz_of_two_dimensional_images_is_grey(tmp_path: Path) -> None:
    grey = random_images(5, seed=2, channels=1)
    np.savez(tmp_path / "a.npz", arr_0=grey[:, 0].numpy())
    assert torch.equal(read(tmp_path / "a.npz", channels=1), grey)


def test_a_directory_is_read_with_its_subdirectories_but_without_the_grid_of_samples(tmp_path: Path) -> None:
    images = random_images(4, seed=3)
    write_pngs(tmp_path / "b", images[2:])
    write_pngs(tmp_path / "a", images[:2])
    write_pngs(tmp_path, random_images(1, seed=4, width=50))
    (tmp_path / "00000.png").rename(tmp_path / "grid.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(read(tmp_path), images)


@pytest.mark.parametrize("kind", ["directory", "npz", "tensor"])
def test_size_takes_the_middle_square(tmp_path: Path, kind: str) -> None:
    images = (20 * torch.arange(10, dtype=torch.uint8)).expand(2, 3, 6, 10)  # brighter from left to right
    make = {"directory": lambda: write_pngs(tmp_path / "x", images), "tensor": lambda: images}
    make["npz"] = lambda: write_npz(tmp_path / "x.npz", images)
    found = read(make[kind](), size=3)
    assert found.shape == (2, 3, 3, 3)
    assert (found.int() - torch.tensor([50, 90, 130])).abs().max() <= 1  # pairs of the columns 2 to 7
    assert torch.equal(read(images[..., 2:8], size=6), images[..., 2:8])


def test_images_of_different_sizes_are_told_with_their_names(tmp_path: Path) -> None:
    write_pngs(tmp_path, random_images(2, seed=0))
    Image.new("RGB", (9, 7)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=r"one size, but 00000.png is 8x8 and odd.png is 7x9; give a size"):
        read(tmp_path)
    assert read(tmp_path, size=8).shape == (3, 3, 8, 8)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write_pngs(tmp_path, random_images(2, seed=0))
    whole = (tmp_path / "00001.png").read_bytes()
    (tmp_path / "00001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00001.png can't be read as an image: "):
        read(tmp_path)


def test_an_npz_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", random_images(50, seed=0))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a.npz can't be read as an .npz file"):
        open_images(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"must be uint8 \[n, H, W, 1 or 3\] or \[n, H, W\], got float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \(2, 3, 8, 8\)"),
        (np.zeros((2, 8), np.uint8), r"got uint8 \(2, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
    ],
    ids=["float", "channels-first", "flat", "empty"],
)
def test_an_array_of_another_kind_is_told(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 8, 8), r"image 0 is torch.float32 \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"image 0 is torch.uint8 \(8, 8, 3\)"),
        ({"image": 1}, "image 0 is dict"),
    ],
    ids=["float", "channels-last", "dictionary"],
)
def test_a_dataset_of_other_things_is_told(item, message: str) -> None:
    with pytest.raises(ValueError, match="must be PIL images or uint8 tensors .*" + message):
        read([item])


def test_sources_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    for source, message in {
        tmp_path / "nothing": "nothing' is not there",
        tmp_path / "a.txt": "a.txt' is another file",
        tmp_path / "empty": r"empty holds no images \(.bmp",
        tmp_path / "other.npz": "other.npz holds no images: it has no array arr_0",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_images(source)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        open_images(tmp_path, channels=4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        open_images(tmp_path, size=0)


def test_a_huge_image_and_one_of_an_unsafe_format_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")  # some kB
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(
        ValueError, match=r"bomb.png can't be read as an image: it has 9000 x 8000 pixels, more than 67"
    ):
        read(tmp_path)


def test_an_npz_file_of_huge_images_is_refused_by_its_header(tmp_path: Path) -> None:
    write_npz(tmp_path / "images.npz", torch.zeros(1, 1, 8193, 8192, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images\.npz holds images of 8192 x 8193 pixels, more than 67108864"):
        open_images(tmp_path / "images.npz")
