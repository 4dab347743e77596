"""A source of text in a recipe, as data, and the readers of its files, which start at any place."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from moh._extras import require
from moh.data.text.files import read_text

Kind = Literal["auto", "text", "jsonl", "parquet", "dataset", "corpus"]

SMALLEST_SHARE = 1e-4
"""Smallest share of a source in a mixture: sources are interleaved in rounds of 10,000 sequences."""


@dataclass(frozen=True)
class SourceRecipe:
    """One source of documents.

    Args:
        path: a file; a directory, whose files of one kind are read in the order of their names; a Hugging Face data
            set (a name on the hub, or a directory made by `save_to_disk`); or the name of a built-in corpus.
        kind: "text" (.txt, .md, .html: one document per file), "jsonl" (one per line; .gz too), "parquet" (one per row),
            "dataset" (Hugging Face), "corpus" (built in), or "auto" to detect it.
        weight: share of the run's sequences that come from this source, relative to the other sources' weights.
        text_field: field or column of the text in JSONL, Parquet and data sets.
        subset: configuration of a Hugging Face data set.
        split: the data set's (default train). For other kinds, "train" leaves out every tenth document, "heldout" reads only
            those, null reads all.
    """

    path: str
    kind: Kind = "auto"
    weight: float = 1.0
    text_field: str = "text"
    subset: str | None = None
    split: str | None = None


def check_sources(sources: Sequence[SourceRecipe], *, name: str) -> None:
    """Check what can be checked without the files; messages begin with `name`.

    Raises:
        ValueError: a path is empty, or a weight is not above 0 or too small compared with the others.
    """
    for index, source in enumerate(sources):
        if not source.path:
            raise ValueError(f"{name}[{index}].path must name a file, a directory, a data set or a corpus")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{name}[{index}].weight must be a number above 0, got {source.weight} for {source.path}")
    total = sum(source.weight for source in sources)
    for index, source in enumerate(sources):
        if source.weight / total < SMALLEST_SHARE:
            raise ValueError(
                f"{name}[{index}].weight must be at least {SMALLEST_SHARE} of the sum of all weights, "
                f"got {source.weight} of {total} for {source.path}"
            )


_HEAD = 1 << 16  # bytes of a file that are hashed: enough, with size and time, to notice a change
_ROWS = 256  # rows of a table in memory at a time


class Part(Protocol):
    """A file, a data set or texts in memory."""

    def identity(self) -> list[str]:
        """Strings that change when the texts do."""
        ...

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        """`(place, text)` of every text from `place` on."""
        ...


@dataclass(frozen=True)
class Texts:
    """Texts in memory; a place is an index."""

    texts: Sequence[str]

    def identity(self) -> list[str]:
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return ["texts", digest.hexdigest()]

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        yield from enumerate(self.texts[place:], place)


@dataclass(frozen=True)
class TextFile:
    """A file that is one text; its place is 0."""

    path: Path

    def identity(self) -> list[str]:
        return file_identity(self.path)

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        yield 0, read_text(self.path)


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line, perhaps gzipped; a place is a byte of the uncompressed text."""

    path: Path
    text_field: str

    def identity(self) -> list[str]:
        return [*file_identity(self.path), self.text_field]

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        with self._open() as file:
            file.seek(place)
            for line in file:
                if line.strip():
                    yield place, self._text(line, place)
                place += len(line)

    def _open(self) -> IO[bytes]:
        return gzip.open(self.path, "rb") if self.path.suffix == ".gz" else open(self.path, "rb")  # type: ignore[return-value]

    def _text(self, line: bytes, place: int) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON, or not UTF-8
            raise ValueError(f"{self.path}, byte {place}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, byte {place}: must hold an object, got {type(row).__name__}")
        return _checked(row, self.text_field, f"{self.path}, byte {place}")


@dataclass(frozen=True)
class Parquet:
    """One text per row; a place is a row. Only the text's column is read, a few rows at a time."""

    path: Path
    text_field: str

    def identity(self) -> list[str]:
        return [*file_identity(self.path), self.text_field]

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        parquet = require("pyarrow.parquet", extra="train")
        arrow = require("pyarrow", extra="train")
        try:
            with parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if self.text_field not in names:
                    raise _no_field(self.text_field, names, str(self.path))
                row, groups = 0, list(range(file.num_row_groups))
                # row groups that end before the place are not read
                while groups and row + file.metadata.row_group(groups[0]).num_rows <= place:
                    row += file.metadata.row_group(groups.pop(0)).num_rows
                for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[self.text_field]):
                    for text in batch.column(0).to_pylist():
                        if row >= place:
                            yield row, _string(text, self.text_field, f"{self.path}, row {row}")
                        row += 1
        except (arrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {error}") from None


@dataclass(frozen=True)
class DataSet:
    """A Hugging Face data set, on disk or while it is downloaded; a place is a row."""

    rows: Any
    path: str
    text_field: str

    def identity(self) -> list[str]:
        known = getattr(self.rows, "_fingerprint", None) or f"{self.rows.info.version}"
        return [self.path, str(self.rows.info.config_name), str(self.rows.split), str(known), self.text_field]

    def read(self, place: int) -> Iterator[tuple[int, str]]:
        rows = iter(self.rows.skip(place) if place else self.rows)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # every network library below raises its own
                raise RuntimeError(
                    f"{self.path}: reading stopped before the end ({' '.join(str(error).split())}): start again; a run "
                    "resumes from its last checkpoint"
                ) from error
            if row is None:
                return
            yield place, _checked(row, self.text_field, f"{self.path}, row {place}")
            place += 1


def open_data_set(recipe: SourceRecipe, *, name: str, streaming: bool) -> DataSet:
    """The text column of a split of a Hugging Face data set; as `load_rows`, with messages that name the field.

    Raises:
        ValueError: there is no such data set, configuration, split or column.
        RuntimeError: the download fails.
    """
    where = f"{name}.path {recipe.path}"
    rows = load_rows(recipe.path, recipe.subset, recipe.split, streaming=streaming, where=where)
    columns = rows.column_names
    if columns is not None:
        if recipe.text_field not in columns:
            raise _no_field(recipe.text_field, columns, recipe.path)
        rows = rows.select_columns([recipe.text_field])
    return DataSet(rows, recipe.path, recipe.text_field)


def load_rows(path: str, subset: str | None, split: str | None, *, streaming: bool, where: str) -> Any:
    """A split of a Hugging Face data set, from the hub, from a local directory, or as `save_to_disk` made it.

    Args:
        path: name on the hub, or directory.
        subset: its configuration.
        split: default "train".
        streaming: read it while it is downloaded.
        where: messages begin with it.

    Raises:
        ValueError: there is no such data set, configuration or split.
        RuntimeError: the download fails.
    """
    datasets = require("datasets", extra="train")
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[split or "train"]
        if (folder / "state.json").is_file():
            if split is not None:
                raise ValueError(f"holds only one split: split must be null, got {split!r}")
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, subset, split=split or "train", streaming=streaming)
    except (FileNotFoundError, ValueError, KeyError) as error:  # DatasetNotFoundError is a FileNotFoundError
        message = f"split {error} is not among its splits" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {' '.join(message.split())}") from None
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise RuntimeError(
            f"{where} can't be downloaded ({' '.join(str(error).split())}): start again; what was downloaded is kept"
        ) from error


def file_identity(path: Path) -> list[str]:
    """Path, size, modification time and a hash of the beginning: changes when the file does."""
    about = path.stat()
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    return [str(path.resolve()), str(about.st_size), str(about.st_mtime_ns), head]


def _checked(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise _no_field(text_field, list(row), where)
    return _string(row[text_field], text_field, where)


def _string(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} must hold text, got {type(value).__name__}")
    return value


def _no_field(text_field: str, names: Sequence[str], where: str) -> ValueError:
    return ValueError(f"{where}: no text_field {text_field!r}; there is {', '.join(map(repr, names))}")
