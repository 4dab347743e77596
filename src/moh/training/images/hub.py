"""Images of a Hugging Face data set, from the hub or from disk (`save_to_disk`, or a directory of Parquet files).

Images are decoded here, not by the library, so that a damaged one is skipped as in a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor

from moh.training.images.folders import decode
from moh.training.images.sources import HELDOUT_NAMES, UnreadableImage


class HubImages:
    """One split of a data set.

    Args:
        rows: the split.
        image_column: None takes the one that holds images.
        label_column: None takes the one that holds class labels, else `label`.

    Raises:
        ValueError: there is no such column, or the labels are neither class labels nor names; lists the columns.
    """

    def __init__(
        self, rows: datasets.Dataset, *, image_column: str | None = None, label_column: str | None = None
    ) -> None:
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
            names = sorted(set(values))
            self.classes = tuple(map(str, names))
            places = {name: place for place, name in enumerate(names)}
            self.labels = torch.tensor([places[value] for value in values], dtype=torch.int64)
        self._rows = rows.cast_column(image, datasets.Image(decode=False))
        self._image = image

    def image(self, index: int) -> Image.Image:
        cell = self._rows[index][self._image]
        try:
            if cell is None or (cell["bytes"] is None and cell["path"] is None):
                raise UnreadableImage("there is none")
            return decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes())
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        return f"row {index}"


def load_splits(name: str, train_split: str | None, eval_split: str | None) -> tuple[Any, Any]:
    """`(train, heldout)` rows of a data set; None for held-out ones that it does not have.

    Raises:
        ValueError: it can't be loaded, or has no such split; lists those that it has.
    """
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
            raise ValueError(f"data.{field} {split!r} is none of the splits of {name}: {', '.join(splits)}")
    return splits[train], None if heldout is None else splits[heldout]


def _column(features: Any, asked: str | None, kind: type, usual: tuple[str, ...], field: str) -> str:
    listed = ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{field} {asked!r} is none of the columns: {listed}")
        return asked
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found if len(found) == 1 else [name for name in usual if name in features and (not found or name in found)]
    if not found:
        raise ValueError(f"{field} must be given: which of the columns is it? {listed}")
    return found[0]
