"""Images in tar files are those of the same folders, whichever of timm's layouts holds them; nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from image_cases import CLASSES, write_folders
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader

from moh.data.images.archives import TarImages
from moh.data.images.datasets import load_evaluation_images, load_images, load_training_images
from moh.data.images.formats import FolderImages
from moh.data.images.recipe import ImageDataRecipe
from moh.data.images.sources import UnreadableImage


def pack(folder: Path, file: Path, name: str = ".") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        tar.add(folder, name)
    return file


def one_file(folder: Path, target: Path) -> Path:
    return pack(folder, target / "images.tar", "any/place")


def one_per_class(folder: Path, target: Path) -> Path:
    for name in os.listdir(folder):
        with tarfile.open((target / name).with_suffix(".tar"), "w") as tar:
            for file in (folder / name).iterdir():
                tar.add(file, file.name)
    return target


def tar_of_tars(folder: Path, target: Path) -> Path:
    (target / "inner").mkdir()
    file = target / "all.tar"
    with tarfile.open(file, "w") as tar:
        for part in one_per_class(folder, target / "inner").glob("*.tar"):
            tar.add(part, part.name)
    return file


@pytest.mark.parametrize("layout", [one_file, one_per_class, tar_of_tars])
def test_every_layout_holds_the_images_of_the_folders(tmp_path: Path, layout) -> None:
    classes = ("b10", "b2", "A1")  # timm's order: a1, b2, b10
    folders = FolderImages(write_folders(tmp_path / "data", 3, classes))
    (tmp_path / "tar").mkdir()
    path = layout(tmp_path / "data", tmp_path / "tar")
    files = sorted(tmp_path.rglob("*"))
    images = TarImages(path)
    assert images.classes == folders.classes == ("A1", "b2", "b10")
    assert images.labels.tolist() == folders.labels.tolist()
    for index in range(9):
        assert images.image(index).tobytes() == folders.image(index).tobytes()
        assert images.name(index).startswith(str(path)) and images.name(index).endswith(f"0{index % 3}.png")
    assert sorted(tmp_path.rglob("*")) == files and get_img_extensions() == (".png", ".jpg", ".jpeg")


def test_other_processes_read_the_same_images(tmp_path: Path) -> None:
    images = TarImages(one_file(write_folders(tmp_path / "data", 4), tmp_path))
    expected = [images.image(index).tobytes() for index in range(12)]  # opened here before the processes start

    class Read:
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> bytes:
            return images.image(index).tobytes()

    read = DataLoader(Read(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(read) == expected


def test_train_and_val_are_two_files(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("val", 2)):
        pack(write_folders(tmp_path / "data" / name, count), tmp_path / "tar" / f"{name}.tar")
    train, heldout = load_images(ImageDataRecipe(str(tmp_path / "tar")))
    assert (len(train.labels), len(heldout.labels)) == (12, 6)
    assert len(load_evaluation_images(str(tmp_path / "tar")).labels) == 6
    assert len(load_training_images(ImageDataRecipe(str(tmp_path / "tar"))).labels) == 12
    (tmp_path / "tar" / "train.tar").unlink()
    with pytest.raises(ValueError, match=r"has no train\.tar next to val\.tar"):
        load_images(ImageDataRecipe(str(tmp_path / "tar")))
    both = pack(tmp_path / "data", tmp_path / "both.tar")
    with pytest.raises(
        ValueError, match=r"must not hold both train/ and val/: give a directory with a tar file of each"
    ):
        load_images(ImageDataRecipe(str(both)))


def test_of_a_single_file_every_tenth_image_is_held_out(tmp_path: Path) -> None:
    file = one_file(write_folders(tmp_path / "data", 12), tmp_path)
    train, heldout = load_images(ImageDataRecipe(str(file)))
    assert (len(train.labels), len(heldout.labels)) == (30, 6) and train.classes == CLASSES
    assert len(load_evaluation_images(str(file)).labels) == 36


def test_hidden_files_are_left_out_and_damaged_ones_named(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "data", 2)
    for name in ("cat/._00.png", ".cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not an image")
    (folder / "dog" / "00.png").write_bytes(b"damaged")
    images = TarImages(one_file(folder, tmp_path))
    assert len(images.labels) == 6 and images.classes == CLASSES
    with pytest.raises(UnreadableImage, match=r"images\.tar/any/place/dog/00\.png: "):
        images.image(2)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"x" * 2000), "must be an uncompressed, whole tar file"),
        (lambda file: tarfile.open(file, "w:gz").close(), "must be an uncompressed, whole tar file"),
        (lambda file: tarfile.open(file, "w").close(), "holds no images"),
        (lambda file: _add(file, "flat.png"), "must hold images in one folder per class"),
    ],
    ids=["damaged", "compressed", "empty", "flat"],
)  # fmt: skip
def test_what_is_no_tar_file_of_class_folders_is_refused(tmp_path: Path, write, message: str) -> None:
    write(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=f"x.tar {message}"):
        load_images(ImageDataRecipe(str(tmp_path / "x.tar")))


def _add(file: Path, name: str) -> None:
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def write_web_dataset(file: Path, count: int, classes: int = 2) -> None:
    """`count` samples KEY.png and KEY.cls, of classes 0, 1, ..."""
    folder = FolderImages(write_folders(file.with_suffix(""), count))
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for index in range(count):
            for ending, data in (
                ("png", Path(folder.paths[index]).read_bytes()),
                ("cls", str(index % classes).encode()),
            ):
                member = tarfile.TarInfo(f"{index:06}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_web_dataset_has_its_classes_in_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "web").mkdir()
    for name, count in (("train-000", 6), ("train-001", 4), ("val-000", 3)):
        write_web_dataset(tmp_path / name / f"{name}.tar", count)
        (tmp_path / name / f"{name}.tar").rename(tmp_path / "web" / f"{name}.tar")
    data = ImageDataRecipe(str(tmp_path / "web"), cache_dir=str(tmp_path / "cache"))
    train, heldout = load_images(data)
    assert train.classes == heldout.classes == ("0", "1")
    assert (train.labels.tolist(), heldout.labels.tolist()) == ([0, 1] * 5, [0, 1, 0])
    expected = FolderImages(tmp_path / "val-000" / "val-000").image(1)
    assert heldout.image(1).convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    with pytest.raises(ValueError, match=r"data\.eval_split must be one of train, val for .*, got 'test'"):
        load_images(ImageDataRecipe(str(tmp_path / "web"), eval_split="test", cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("parts", [("train-000", "val-000"), ("val-000",), ("train-000",)], ids="-".join)
def test_a_web_dataset_is_evaluated_on_its_held_out_part_or_the_only_one(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "web").mkdir()
    for count, name in enumerate(parts, start=3):
        write_web_dataset(tmp_path / name / f"{name}.tar", count)
        (tmp_path / name / f"{name}.tar").rename(tmp_path / "web" / f"{name}.tar")
    images = load_evaluation_images(str(tmp_path / "web"), str(tmp_path / "cache"))
    assert len(images.labels) == 2 + len(parts)
