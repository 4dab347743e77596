"""Sources of text as a series of documents, each with the position to resume from.

`open_source` detects the format of a `SourceRecipe`; the readers of the formats are in `moh.data.text.readers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from moh._files import files_below
from moh.data.text.corpora import CORPORA, HELDOUT_EVERY, Corpus, corpus_from_files, load_corpus
from moh.data.text.files import SUFFIXES
from moh.data.text.readers import JsonLines, Parquet, Part, SourceRecipe, TextFile, Texts, open_data_set

_SUFFIXES = {
    "text": SUFFIXES,
    "jsonl": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
}
_SAVED_DATA_SET = ("state.json", "dataset_dict.json")  # what `datasets` writes with `save_to_disk`


class Position(NamedTuple):
    """Where a document begins.

    Attributes:
        part: index of the file.
        place: within it: a byte (JSONL), a row (Parquet, data sets) or the index of a text.
        ordinal: documents of the source before it, including those that a split leaves out.
    """

    part: int = 0
    place: int = 0
    ordinal: int = 0


@dataclass(frozen=True)
class Source:
    """Documents of one source.

    Attributes:
        recipe: what it was opened from.
        parts: its files, its data set or its texts.
        split: "train" or "heldout" leave documents out, None reads all.
    """

    recipe: SourceRecipe
    parts: Sequence[Part]
    split: str | None = None

    @property
    def name(self) -> str:
        """The recipe's path, for messages."""
        return self.recipe.path

    @property
    def key(self) -> list[str]:
        """Identifies this source among others, whatever it holds now."""
        path = Path(self.recipe.path)
        named = replace(self.recipe, path=str(path.resolve()) if path.exists() else self.recipe.path, weight=1.0)
        return [str(value) for value in astuple(named)]

    def identity(self) -> list[list[str]]:
        """Changes whenever the documents do: one entry per part."""
        return [part.identity() for part in self.parts]

    def documents(self, start: Position = Position()) -> Iterator[tuple[Position, str]]:  # noqa: B008 (immutable)
        """The documents from `start` on, with the position of each; empty ones are left out.

        Raises:
            ValueError: a file is damaged or lacks the text field; the message names the file and the place.
        """
        ordinal = start.ordinal
        for index in range(start.part, len(self.parts)):
            for place, text in self.parts[index].read(start.place if index == start.part else 0):
                position = Position(index, place, ordinal)
                ordinal += 1
                if text and self._wanted(position.ordinal):
                    yield position, text

    def _wanted(self, ordinal: int) -> bool:
        if self.split is None:
            return True
        return (ordinal % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (self.split == "heldout")


def open_source(
    recipe: SourceRecipe, *, name: str, cache_dir: str | Path | None = None, streaming: bool = False
) -> Source:
    """Detect a recipe's kind of source, and open it for reading.

    Args:
        recipe: the source.
        name: the recipe's field; messages begin with it.
        cache_dir: where built-in corpora are kept.
        streaming: read a Hugging Face data set while it is downloaded.

    Raises:
        FileNotFoundError: the path does not exist, or the directory has no file of the kind.
        ValueError: a directory holds files of several kinds, or `split` or `subset` does not suit the kind.
        RuntimeError: a corpus or a data set can't be fetched.
    """
    kind = recipe.kind if recipe.kind != "auto" else source_kind(recipe, name)
    if kind == "dataset":
        return Source(recipe, [open_data_set(recipe, name=name, streaming=streaming)])
    if recipe.split not in (None, "train", "heldout"):
        raise ValueError(f"{name}.split must be 'train', 'heldout' or null for {recipe.path}, got {recipe.split!r}")
    if recipe.subset is not None:
        raise ValueError(f"{name}.subset is for Hugging Face data sets, but {recipe.path} is of kind {kind!r}")
    if kind == "corpus":
        corpus = _corpus(recipe.path, cache_dir)
        texts = {None: [*corpus.train, *corpus.heldout], "train": corpus.train, "heldout": corpus.heldout}
        return Source(recipe, [Texts(texts[recipe.split])])
    files = source_files(Path(recipe.path), kind, name)
    if (
        kind == "text" and recipe.split is not None
    ):  # one file may hold a whole book: paragraphs are held out, not files
        corpus = corpus_from_files([recipe.path])
        return Source(recipe, [Texts(corpus.train if recipe.split == "train" else corpus.heldout)])
    if kind == "text":
        return Source(recipe, [TextFile(file) for file in files])
    reader = JsonLines if kind == "jsonl" else Parquet
    return Source(recipe, [reader(file, recipe.text_field) for file in files], recipe.split)


@lru_cache(maxsize=8)
def _corpus(name: str, cache_dir: str | Path | None) -> Corpus:
    """Read only once: its parts, and a tokenizer made from it, are separate sources."""
    return load_corpus(name, cache_dir)


def source_kind(recipe: SourceRecipe, name: str) -> str:
    """The kind of a source by its path: "text", "jsonl", "parquet", "dataset" or "corpus".

    Raises:
        FileNotFoundError: the path does not exist, or the directory has no file of any kind.
        ValueError: a directory holds files of several kinds.
    """
    path = Path(recipe.path)
    if path.is_file():
        found = [kind for kind, suffixes in _SUFFIXES.items() if path.name.lower().endswith(suffixes)]
        return found[0] if found else "text"
    if path.is_dir():
        if any((path / file).is_file() for file in _SAVED_DATA_SET):
            return "dataset"
        found = [kind for kind, suffixes in _SUFFIXES.items() if _below(path, suffixes)]
        if len(found) > 1:
            raise ValueError(f"{name}.path {recipe.path} holds files of several kinds ({', '.join(found)}): give kind")
        if not found:
            endings = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
            raise FileNotFoundError(f"{name}.path: no file that ends in {endings} in the directory {recipe.path}")
        return found[0]
    if recipe.path in CORPORA:
        return "corpus"
    if recipe.path.startswith((".", "/", "~")) or recipe.path.count("/") > 1 or path.suffix:
        raise FileNotFoundError(f"{name}.path: no such file or directory: {recipe.path}")
    return "dataset"


def source_files(path: Path, kind: str, name: str) -> list[Path]:
    """The file itself, or the files of that kind below a directory, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    files = _below(path, _SUFFIXES[kind])
    if not files:
        raise FileNotFoundError(f"{name}.path: no such file, and no directory with {kind} files: {path}")
    return files


def _below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(file for folder, name in files_below(path, suffixes) if (file := Path(folder, name)).is_file())
