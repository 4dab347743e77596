"""The images of a recipe or a command line: Fashion-MNIST, a directory, tar files, or a Hugging Face data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moh.data.images.archives import TarImages, has_tar_files, is_web_dataset, open_web_dataset, tar_parts
from moh.data.images.formats import (
    FASHION_MNIST,
    FolderImages,
    HubImages,
    has_idx_files,
    load_fashion_mnist,
    load_splits,
    read_idx_folder,
)
from moh.data.images.recipe import ImageDataRecipe
from moh.data.images.sources import HELDOUT_NAMES, ImageSource, hold_out, with_classes


def load_images(data: ImageDataRecipe) -> tuple[ImageSource, ImageSource]:
    """`(train, heldout)` images of a recipe, with the same classes.

    A directory either has train/ and val/ (or validation/, valid/, test/) with one folder per class in each, or only class
    folders; then every tenth image is held out (`moh.data.images.sources.hold_out`), as in a Hugging Face data set
    without such a split. Tar files are treated likewise: train.tar and val.tar in a directory, or all others.

    Raises:
        ValueError: the images don't exist, or the two parts have different classes.
        RuntimeError: Fashion-MNIST is not on this machine and can't be fetched.
    """
    train, heldout = _open(data, with_heldout=True)
    if heldout is None:
        return hold_out(train)
    return train, with_classes(heldout, train.classes, what="the held-out images", than="the training images")


def load_training_images(data: ImageDataRecipe) -> ImageSource:
    """All training images of a recipe without evaluation: as `load_images`, but nothing is held out or read besides.

    Raises:
        ValueError: the images don't exist.
        RuntimeError: as `load_images`.
    """
    return _open(data, with_heldout=False)[0]


def load_evaluation_images(dataset: str, cache_dir: str | None = None, **columns: Any) -> ImageSource:
    """The images for `moh eval` and `moh inspect`: the held-out part, or all of a directory of class folders.

    Args:
        dataset, cache_dir: as in `ImageDataRecipe`.
        columns: its `eval_split`, `image_column` and `label_column`, for a Hugging Face data set.

    Raises:
        ValueError, RuntimeError: as `load_images`.
    """
    folder = Path(dataset).expanduser()
    if has_tar_files(folder) and not is_web_dataset(folder):
        heldout = [name for name in tar_parts(folder) if name != "train"]
        return TarImages(folder / f"{heldout[0]}.tar" if heldout else folder)
    if has_tar_files(folder):
        return _web_dataset_to_evaluate(folder, cache_dir, **columns)
    if folder.is_dir() and not has_idx_files(folder) and not _is_hub_directory(folder):
        heldout = [name for name in _parts(folder) if name != "train"]
        return FolderImages(folder / heldout[0] if heldout else folder)
    return load_images(ImageDataRecipe(dataset, cache_dir=cache_dir, **columns))[1]


def _open(data: ImageDataRecipe, *, with_heldout: bool) -> tuple[ImageSource, ImageSource | None]:
    """The training images and, if requested and separate, the held-out ones."""
    folder = Path(data.dataset).expanduser()
    if data.dataset == FASHION_MNIST:
        return load_fashion_mnist(data.cache_dir)
    if folder.is_dir() and has_idx_files(folder):
        return read_idx_folder(folder)
    if has_tar_files(folder) and is_web_dataset(folder):
        return _web_dataset(data, folder, with_heldout=with_heldout)
    if has_tar_files(folder):
        return _tar_files(folder, with_heldout=with_heldout)
    if folder.is_dir() and not _is_hub_directory(folder):
        return _folders(folder, with_heldout=with_heldout)
    _check_name(data.dataset)
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    rows, heldout_rows = load_splits(data.dataset, data.train_split, data.eval_split)
    heldout = HubImages(heldout_rows, **columns) if with_heldout and heldout_rows is not None else None
    return HubImages(rows, **columns), heldout


def _folders(folder: Path, *, with_heldout: bool) -> tuple[ImageSource, ImageSource | None]:
    parts = _parts(folder)
    if not parts:
        return FolderImages(folder), None
    if "train" not in parts:
        raise ValueError(f"data.dataset {folder} has no train/ next to {', '.join(f'{name}/' for name in parts)}")
    heldout = next((name for name in parts if name != "train" and with_heldout), None)
    return FolderImages(folder / "train"), None if heldout is None else FolderImages(folder / heldout)


def _web_dataset_to_evaluate(
    path: Path,
    cache_dir: str | None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """The requested split, else the held-out one, else the only one."""
    splits = open_web_dataset(path, cache_dir=cache_dir)
    name = eval_split or next(name for name in (*HELDOUT_NAMES, *splits) if name in splits)
    if name not in splits:
        raise ValueError(f"eval_split must be one of {', '.join(splits)} for {path}, got {name!r}")
    return HubImages(splits[name], image_column=image_column, label_column=label_column or "cls")


def _web_dataset(data: ImageDataRecipe, path: Path, *, with_heldout: bool) -> tuple[ImageSource, ImageSource | None]:
    splits = open_web_dataset(path, cache_dir=data.cache_dir)
    train, evaluation = data.train_split or "train", data.eval_split
    evaluation = evaluation or next((name for name in HELDOUT_NAMES if name in splits), None)
    for field, name in (("train_split", train), ("eval_split", evaluation)):
        if name is not None and name not in splits:
            raise ValueError(f"data.{field} must be one of {', '.join(splits)} for {path}, got {name!r}")
    columns = {"image_column": data.image_column, "label_column": data.label_column or "cls"}
    heldout = HubImages(splits[evaluation], **columns) if with_heldout and evaluation is not None else None
    return HubImages(splits[train], **columns), heldout


def _tar_files(path: Path, *, with_heldout: bool) -> tuple[ImageSource, ImageSource | None]:
    parts = tar_parts(path)
    if not parts:
        return TarImages(path), None
    if "train" not in parts:
        raise ValueError(f"data.dataset {path} has no train.tar next to {', '.join(f'{name}.tar' for name in parts)}")
    heldout = next((name for name in parts if name != "train" and with_heldout), None)
    return TarImages(path / "train.tar"), None if heldout is None else TarImages(path / f"{heldout}.tar")


def _parts(folder: Path) -> list[str]:
    """The subfolders of a directory that is split into train/, val/ and so on; none if they are class folders."""
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    found = [name for name in ("train", *HELDOUT_NAMES) if name in names]
    # A single such name among others may be a class's
    split = names <= {"train", *HELDOUT_NAMES} or ("train" in found and len(found) > 1)
    return found if split else []


def _is_hub_directory(folder: Path) -> bool:
    names = ("dataset_dict.json", "dataset_info.json", "*.parquet", "data/*.parquet")
    return any(any(folder.glob(name)) for name in names)


def _check_name(dataset: str) -> None:
    looks_local = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    if looks_local and not Path(dataset).expanduser().is_dir():
        raise ValueError(
            f"data.dataset must be {FASHION_MNIST!r}, a directory, a .tar file or a data set's name, but there is no {dataset!r}"
        )
