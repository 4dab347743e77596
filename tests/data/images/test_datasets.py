"""Images are read in every form and split the same way each time; errors name what is wrong with a data set."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from image_cases import CLASSES, pictures, write_folders, write_idx
from PIL import EpsImagePlugin, Image
from torchvision.datasets import FashionMNIST, ImageFolder

from moh.data.images import formats
from moh.data.images.datasets import load_evaluation_images, load_images, load_training_images
from moh.data.images.formats import FolderImages, HubImages, decode
from moh.data.images.recipe import ImageDataRecipe
from moh.data.images.sources import TensorImages, UnreadableImage, every_nth, hold_out, with_classes


def load(dataset: object, **fields: object):
    return load_images(ImageDataRecipe(str(dataset), **fields))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzipped"])
def test_idx_files_are_read(tmp_path: Path, compressed: bool) -> None:
    train, test = load(write_idx(tmp_path, train=20, test=10, compressed=compressed))
    assert torch.equal(train.pixels, pictures(torch.arange(20) % 10))
    assert train.labels.tolist() == [*range(10), *range(10)] and len(test.labels) == 10
    assert train.classes == tuple(FashionMNIST.classes)
    assert train.image(3).getpixel((0, 3)) == 250


@pytest.mark.parametrize("where", ["installed", "cache", "torchvision"])
def test_a_local_copy_of_fashion_mnist_is_looked_for_first(tmp_path: Path, monkeypatch, where: str) -> None:
    monkeypatch.setattr(formats, "apt_download", None)
    monkeypatch.setattr(formats, "_BELOW", Path("share/fashion-mnist"))
    folder = {
        "installed": tmp_path / "root",
        "cache": tmp_path / "dataset-fashion-mnist" / "share" / "fashion-mnist",
        "torchvision": tmp_path / "FashionMNIST" / "raw",
    }[where]
    if where == "installed":
        monkeypatch.setattr(formats, "_BELOW", folder.relative_to("/"))
    write_idx(folder, train=10)
    assert len(load("fashion-mnist", cache_dir=str(tmp_path))[0].labels) == 10


def test_fashion_mnist_that_is_not_here_is_fetched_from_debian(tmp_path: Path, monkeypatch) -> None:
    fetched = []

    def apt_download(package: str, target: Path, *, advice: str) -> None:
        fetched.append(package)
        write_idx(target / "share", train=10)

    monkeypatch.setattr(formats, "_BELOW", Path("share"))
    monkeypatch.setattr(formats, "apt_download", apt_download)
    for _ in range(2):
        assert len(load("fashion-mnist", cache_dir=str(tmp_path))[0].labels) == 10
    assert fetched == ["dataset-fashion-mnist"]


def test_fashion_mnist_that_cannot_be_had_names_all_that_was_tried(tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(formats, "_BELOW", Path("nowhere"))
    monkeypatch.setattr(formats, "apt_download", fail)
    monkeypatch.setattr(formats, "FashionMNIST", fail)
    with pytest.raises(
        RuntimeError, match=f"neither in /nowhere nor in {tmp_path}; no network; torchvision: no network"
    ):
        load("fashion-mnist", cache_dir=str(tmp_path))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzipped"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, compressed: bool) -> None:
    write_idx(tmp_path, compressed=compressed)
    (file,) = tmp_path.glob("train-images*")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load(tmp_path)


def test_folders_have_torchvisions_order_and_classes(folders: Path) -> None:
    train, heldout = load(folders)
    reference = ImageFolder(str(folders / "train"))
    assert list(train.classes) == reference.classes == list(CLASSES)
    assert train.paths == [path for path, _ in reference.samples] and train.labels.tolist() == reference.targets
    assert train.image(5).tobytes() == reference[5][0].tobytes()
    assert len(heldout.labels) == 12 and "val" in heldout.name(0)


def test_of_folders_that_are_not_split_every_tenth_image_of_a_class_is_held_out(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 12)
    train, heldout = load(tmp_path / "data")
    assert [Path(heldout.name(i)).name for i in range(6)] == ["00.png", "10.png"] * 3
    assert heldout.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(train.labels) == 30
    names = {source.name(i) for source in (train, heldout) for i in range(len(source.labels))}
    assert len(names) == 36
    assert load(tmp_path / "data")[0].indices.equal(train.indices)


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 1, ("cat",))
    with pytest.raises(ValueError, match="class 'cat' has a single image"):
        load(tmp_path / "data")


def test_an_empty_class_folder_is_named(folders: Path) -> None:
    shutil.rmtree(folders / "train" / "dog")
    (folders / "train" / "dog").mkdir()
    (folders / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"class folder {folders / 'train' / 'dog'} has no images"):
        load(folders)


def test_held_out_classes_that_differ_are_named(folders: Path) -> None:
    (folders / "val" / "eel").rename(folders / "val" / "eal")
    message = "the held-out images must have the 3 classes of the training images, but lacks 'eel' and also has 'eal'"
    with pytest.raises(ValueError, match=message):
        load(folders)


def test_a_directory_without_class_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} must hold one folder per class, but it has no folders"):
        load(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"must be 'fashion-mnist', a directory, a \.tar file or a data set's name, but there is no '/no",
    ):
        load("/nowhere/at/all")


def test_images_to_evaluate_on_are_the_held_out_part_or_all(folders: Path, idx_folder: Path) -> None:
    assert len(load_evaluation_images(str(folders)).labels) == 12
    assert len(load_evaluation_images(str(folders / "train")).labels) == 36
    assert len(load_evaluation_images(str(idx_folder)).labels) == 21


def test_images_to_train_on_alone_are_all_and_need_no_held_out_ones(folders: Path, tmp_path: Path) -> None:
    def count(dataset: Path) -> int:
        return len(load_training_images(ImageDataRecipe(str(dataset))).labels)

    (folders / "val" / "eel").rename(folders / "val" / "eal")
    assert count(folders) == count(folders / "train") == 36
    shutil.rmtree(folders / "val")
    assert count(folders) == 36
    assert count(write_folders(tmp_path / "single", 1)) == 3
    assert count(write_idx(tmp_path / "idx", train=20, test=10)) == 20


def test_a_damaged_image_raises_what_says_so(folders: Path) -> None:
    train, _ = load(folders)
    for index, content in enumerate([b"", b"no image", Path(train.paths[0]).read_bytes()[:60]]):
        Path(train.paths[index]).write_bytes(content)
        with pytest.raises(UnreadableImage, match=f"{index:02d}.png"):
            train.image(index)
    Path(train.paths[3]).unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        train.image(3)


@pytest.mark.parametrize("other", ["lost+found", "devkit"])
def test_folders_beside_train_and_val_are_no_classes(folders: Path, other: str) -> None:
    before = load(folders)
    (folders / other).mkdir()
    train, heldout = load(folders)
    assert train.classes == heldout.classes == before[0].classes
    assert len(load_evaluation_images(str(folders)).labels) == 12


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_of_more_than_8_bits_is_unreadable_instead_of_white(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format="TIFF")
    with pytest.raises(UnreadableImage, match="more than 8 bits"):
        decode(file.getvalue())


@pytest.mark.parametrize("labels", ["names", "strings", "numbers"])
def test_a_hugging_face_data_set_is_read_from_disk(tmp_path: Path, folders: Path, labels: str) -> None:
    datasets = pytest.importorskip("datasets")
    reference, _ = load(folders)
    kind = {
        "names": datasets.ClassLabel(names=list(CLASSES)),
        "strings": datasets.Value("string"),
        "numbers": datasets.Value("int64"),
    }[labels]
    values = [CLASSES[label] if labels == "strings" else label for label in reference.labels.tolist()]
    features = datasets.Features({"picture": datasets.Image(), "label": kind, "note": datasets.Value("string")})
    columns = {"picture": reference.paths, "label": values, "note": ["x"] * 36}
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(0, 36, 2))}).save_to_disk(tmp_path / "saved")
    train, heldout = load(tmp_path / "saved")
    assert train.classes == (("0", "1", "2") if labels == "numbers" else CLASSES)
    assert train.labels.equal(reference.labels) and len(heldout.labels) == 18
    assert train.image(4).tobytes() == reference.image(4).tobytes()
    with pytest.raises(ValueError, match=r"data.label_column 'lable' is not among the columns: picture, label, note"):
        load(tmp_path / "saved", label_column="lable")
    with pytest.raises(ValueError, match=r"data.eval_split 'dev' is not among the splits of .*: train, test"):
        load(tmp_path / "saved", eval_split="dev")
    with pytest.raises(ValueError, match=r"data.image_column 'note' must hold images"):
        load(tmp_path / "saved", image_column="note")


def test_a_damaged_row_of_a_hugging_face_data_set_is_unreadable(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    images = [{"bytes": b"no image", "path": None}, None] * 10
    rows = datasets.Dataset.from_dict({"image": images, "label": [0] * 20}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    train, heldout = load(tmp_path / "saved")
    assert (len(train.labels), len(heldout.labels)) == (18, 2)
    for index in range(2):
        with pytest.raises(UnreadableImage, match=r"row [12]"):
            train.image(index)


def test_labels_follow_the_wanted_order_of_classes(tensors: TensorImages, folders: Path) -> None:
    order = ("eel", "cat", "dog")
    for source in (tensors, load(folders)[0]):
        view = with_classes(source, order, what="these", than="those")
        assert [order[label] for label in view.labels] == [CLASSES[label] for label in source.labels]
        assert view.image(2).tobytes() == source.image(2).tobytes()


def test_a_sample_spreads_over_all_classes(folders: Path) -> None:
    train, _ = load(folders)
    assert every_nth(train, 6).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert every_nth(train, 100) is train
    with pytest.raises(ValueError, match="at least 1 image is needed, got 0"):
        every_nth(train, 0)


def test_tensors_stay_tensors_when_held_out(tensors: TensorImages) -> None:
    train, heldout = hold_out(tensors)
    assert isinstance(train, TensorImages) and isinstance(heldout, TensorImages)
    assert train.mean == tensors.mean and len(train.labels) + len(heldout.labels) == 24


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 0], r"pixels must be uint8 \[n, 1 or 3, H, W\]"),
        (torch.zeros(2, 1, 8, 8), [0, 0], "pixels must be uint8 .*, got torch.float32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0], r"labels must have shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 3], "labels must be between 0 and 2, got 0 to 3"),
    ],
)
def test_tensors_that_are_no_labelled_images_are_refused(pixels, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        TensorImages(pixels, torch.tensor(labels), CLASSES)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files of images that must not be decoded: a bomb of 72 million pixels, and formats with rare decoders or programs."""
    found = {}
    for name, image in {
        "bomb": Image.new("1", (9000, 8000)),
        **dict.fromkeys(("EPS", "ICNS", "TGA", "PCX"), Image.new("RGB", (16, 16))),
    }.items():
        image.save(file := io.BytesIO(), format="PNG" if name == "bomb" else name)
        found[name] = file.getvalue()
    assert all(len(data) < 20_000 for data in found.values())
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    return found


def test_a_bomb_and_an_unsafe_format_are_unreadable_in_every_source(hostile: dict[str, bytes], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for name, data in hostile.items():
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / "0.png").write_bytes(data)
        columns = {"image": [{"bytes": data, "path": None}], "label": [0]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
        rows = datasets.Dataset.from_dict(columns, features=features)
        message = "it has 9000 x 8000 pixels, more than 67108864" if name == "bomb" else "cannot identify image file"
        for read in (
            lambda data=data: decode(data),
            lambda: FolderImages(tmp_path).image(0),
            lambda rows=rows: HubImages(rows).image(0),
        ):
            with pytest.raises(UnreadableImage, match=message):
                read()


def test_numbered_class_folders_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    from timm.data.readers.reader_image_folder import find_images_and_targets

    for name in [*map(str, range(12)), "b10", "b9", "C1", "a"]:
        write_picture(tmp_path / name / "x.png")
    found = FolderImages(tmp_path)
    assert found.classes == (*map(str, range(12)), "a", "b9", "b10", "C1")
    images, index = find_images_and_targets(str(tmp_path))
    assert list(index) == list(found.classes)
    assert dict(images) == dict(zip(found.paths, found.labels.tolist(), strict=True))


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path: Path, caplog) -> None:
    for name in (
        ".ipynb_checkpoints/x.png",
        "a/x.png",
        "a/.ipynb_checkpoints/x-checkpoint.png",
        "a/._x.png",
        "b/y/x.png",
    ):
        write_picture(tmp_path / name)
    write_picture(tmp_path / "beside.png")
    found = FolderImages(tmp_path)
    assert found.classes == ("a", "b")
    assert found.paths == [str(tmp_path / "a/x.png"), str(tmp_path / "b/y/x.png")]
    for name in (".ipynb_checkpoints", "a/.ipynb_checkpoints", "a/._x.png"):
        assert name in caplog.text


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
