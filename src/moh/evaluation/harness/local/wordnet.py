"""Reads WordNet's data files (wndb(5WN)): sets of synonyms with definition, broader terms, opposites and how common they are.

Not for making questions (`moh.evaluation.harness.local.questions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moh.training._sources import apt_download
from moh.training.text import decode_utf8

PARTS_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
"""Name in file names -> number in keys of senses."""

_PACKAGE = "wordnet-base"
_SATELLITE = 5  # an adjective that belongs to another; its senses are keyed by the number 5
_INSTALLED = Path("usr/share/wordnet")


@dataclass(frozen=True)
class Synset:
    """A set of synonyms.

    Attributes:
        offset: where it is in its file, by which others refer to it.
        words: the synonyms, the first being the most usual; words of a phrase are separated by spaces.
        field: number of its field of meaning, such as animals.
        definition: what they mean, without the examples.
        broader: offsets of broader terms of the same part of speech.
        opposites: (index of the word here, offset, index of the word there), from 0.
        counts: how often each word was seen in this sense in WordNet's tagged texts.
    """

    offset: int
    words: tuple[str, ...]
    field: int
    definition: str
    broader: tuple[int, ...]
    opposites: tuple[tuple[int, int, int], ...]
    counts: tuple[int, ...]


def wordnet_directory(cache_dir: Path) -> Path:
    """Where WordNet's files are: where Debian's package installs them, or in the cache, fetched if need be.

    Raises:
        RuntimeError: it can be had neither from this machine nor from its package registry.
    """
    for root in (Path("/"), cache_dir / _PACKAGE):
        if (root / _INSTALLED / "data.noun").is_file():
            return root / _INSTALLED
    advice = "the other tasks of the harness, and task files of your own (--include-path), don't need it"
    apt_download(_PACKAGE, cache_dir / _PACKAGE, advice=advice)
    return cache_dir / _PACKAGE / _INSTALLED


def read_synsets(directory: Path, part_of_speech: str) -> list[Synset]:
    """All synsets of one part of speech, in the file's order.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: a file is damaged.
    """
    counts = dict(_counts(directory / "cntlist.rev", PARTS_OF_SPEECH[part_of_speech]))
    file = directory / f"data.{part_of_speech}"
    found = []
    for number, line in enumerate(decode_utf8(file.read_bytes(), name=file).splitlines(), 1):
        if line.startswith("  "):  # the licence
            continue
        try:
            found.append(_synset(line, counts))
        except (ValueError, IndexError):
            raise ValueError(f"{file}, line {number}: no synset: {line[:60]!r}") from None
    return found


def _synset(line: str, counts: dict[tuple[str, int, int], int]) -> Synset:
    data, _, gloss = line.partition(" | ")
    fields = iter(data.split())
    offset, field, kind = int(next(fields)), int(next(fields)), next(fields)
    spelled = [(next(fields), int(next(fields), 16)) for _ in range(int(next(fields), 16))]
    broader, opposites = [], []
    for _ in range(int(next(fields))):
        symbol, target, target_kind, ends = next(fields), int(next(fields)), next(fields), next(fields)
        if symbol == "@" and target_kind == kind:
            broader.append(target)
        elif symbol == "!" and ends != "0000":
            opposites.append((int(ends[:2], 16) - 1, target, int(ends[2:], 16) - 1))
    plain = [word.partition("(")[0] for word, _ in spelled]  # without the place of an adjective, as in "galore(ip)"
    keys = [(word.lower(), field, number) for word, (_, number) in zip(plain, spelled, strict=True)]
    return Synset(
        offset=offset,
        words=tuple(word.replace("_", " ") for word in plain),
        field=field,
        definition=gloss.partition('; "')[0].strip().rstrip(";"),
        broader=tuple(broader),
        opposites=tuple(opposites),
        counts=tuple(counts.get(key, 0) for key in keys),
    )


def _counts(file: Path, part_of_speech: int) -> Iterator[tuple[tuple[str, int, int], int]]:
    """((word, field, number within the field), how often it was seen), from lines "word%pos:field:number:... sense n"."""
    wanted = {part_of_speech, _SATELLITE} if part_of_speech == PARTS_OF_SPEECH["adj"] else {part_of_speech}
    for line in decode_utf8(file.read_bytes(), name=file).splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        kind, field, number = rest.split(":")[:3]
        if int(kind) in wanted:
            yield (word, int(field), int(number)), int(count)
