"""Questions made from WordNet's entries and running text; the same text always gives the same questions."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moh.data.fetch import apt_download
from moh.data.text.files import decode_utf8

Question = dict[str, Any]

CHOICES = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORDS_OF_CONTEXT = (30, 120)  # long enough to guess the end from, short enough for small models

PARTS_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
"""Name in file names -> number in sense keys."""

_PACKAGE = "wordnet-base"
_SATELLITE = 5  # an adjective grouped under another; 5 in sense keys
_INSTALLED = Path("usr/share/wordnet")


@dataclass(frozen=True)
class Synset:
    """A set of synonyms.

    Attributes:
        offset: its position in the file, by which others refer to it.
        words: the synonyms, the most usual first; words of a phrase are separated by spaces.
        field: number of its field of meaning, such as animals.
        definition: without the examples.
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
    """Where WordNet's files are: where Debian's package installs them, or in the cache, fetched if necessary.

    Raises:
        RuntimeError: they are available neither on this machine nor from the package registry.
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
        FileNotFoundError: a file is missing.
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
            raise ValueError(f"{file}, line {number} is not a synset: {line[:60]!r}") from None
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
    plain = [word.partition("(")[0] for word, _ in spelled]  # without an adjective's position, as in "galore(ip)"
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
    """((word, field, number within the field), occurrences), from lines "word%pos:field:number:... sense n"."""
    wanted = {part_of_speech, _SATELLITE} if part_of_speech == PARTS_OF_SPEECH["adj"] else {part_of_speech}
    for line in decode_utf8(file.read_bytes(), name=file).splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        kind, field, number = rest.split(":")[:3]
        if int(kind) in wanted:
            yield (word, int(field), int(number)), int(count)


def definitions(synsets: Sequence[Synset], *, count: int, seed: int = 0) -> list[Question]:
    """Which of four definitions, all from the same field of meaning, is that of a word in common use."""
    draw = random.Random(seed)
    fields: dict[int, list[Synset]] = {}
    for synset in synsets:
        fields.setdefault(synset.field, []).append(synset)
    found = []
    for synset in _shuffled(synsets, draw):
        others = _others(fields[synset.field], lambda other: other.definition, {synset.definition}, draw)
        if _is_usual(synset) and len(others) == CHOICES - 1:
            question = f'The noun "{synset.words[0]}" means'
            found.append(_choice(question, synset.definition, others, draw))
        if len(found) == count:
            break
    return found


def kinds(synsets: Sequence[Synset], *, count: int, seed: int = 0) -> list[Question]:
    """Which of four broader terms is that of a word; the wrong ones belong to other words of its field of meaning."""
    draw = random.Random(seed)
    by_offset = {synset.offset: synset for synset in synsets}
    fields: dict[int, list[Synset]] = {}
    for synset in synsets:
        if any(offset in by_offset for offset in synset.broader):
            fields.setdefault(synset.field, []).append(synset)

    def broader(synset: Synset) -> str:
        return next(by_offset[offset] for offset in synset.broader if offset in by_offset).words[0]

    found = []
    for synset in _shuffled([synset for members in fields.values() for synset in members], draw):
        true = _ancestors(synset, by_offset) | set(synset.words)
        answer = broader(synset)
        # "a hot dog is a kind of dog" and the like can be guessed from the letters
        others = _others(fields[synset.field], broader, true, draw)
        if _is_usual(synset) and len(others) == CHOICES - 1 and answer.lower() not in synset.words[0].lower():
            found.append(_choice(f"{_with_article(synset.words[0])} is a kind of", answer, others, draw))
        if len(found) == count:
            break
    return found


def opposites(synsets: Sequence[Synset], *, count: int, seed: int = 0) -> list[Question]:
    """The opposite of an adjective, to be written; any of several is right. No two opposites are asked twice."""
    by_offset = {synset.offset: synset for synset in synsets}
    answers: dict[str, set[str]] = {}
    for synset in synsets:
        for here, offset, there in synset.opposites:
            other = by_offset.get(offset)
            if other is not None and synset.counts[here] and other.counts[there]:
                answers.setdefault(synset.words[here], set()).add(other.words[there])
    found, asked = [], set[str]()
    for word in _shuffled(sorted(answers), random.Random(seed)):
        if word not in asked and not any(word in answer or answer in word for answer in answers[word]):
            found.append({"word": word, "answers": sorted(answers[word])})
            asked |= answers[word]
        if len(found) == count:
            break
    return found


def last_words(documents: Sequence[str], *, count: int, seed: int = 0) -> list[Question]:
    """The last word of a sentence, which occurs in the text before: to be predicted from all of that text."""
    found = []
    passages = [passage for text in documents for passage in _passages(text, overlapping=True)]
    for passage in _shuffled(passages, random.Random(seed)):
        body, _, last = " ".join(passage).rpartition(" ")
        word = last.rstrip(".!?")
        if word.isalpha() and len(word) > 3 and re.search(rf"\b{word}\b", body):
            found.append({"text": body, "word": word})
        if len(found) == count:
            break
    return found


def next_sentences(documents: Sequence[str], *, count: int, seed: int = 0) -> list[Question]:
    """Which of four sentences of the same document comes next."""
    draw = random.Random(seed)
    found = []
    passages = [(passage, index) for index, text in enumerate(documents) for passage in _passages(text)]
    sentences = [list(_sentences(text)) for text in documents]
    for passage, index in _shuffled(passages, draw):
        *context, answer = passage
        others = _others(sentences[index], lambda sentence: sentence, set(passage), draw)
        if context and len(others) == CHOICES - 1:
            found.append(_choice(" ".join(context), answer, others, draw))
        if len(found) == count:
            break
    return found


def _passages(text: str, *, overlapping: bool = False) -> Iterator[list[str]]:
    """Two or more consecutive sentences with about a hundred words; overlapping passages begin at every sentence."""
    fewest, most = _WORDS_OF_CONTEXT
    passage: list[str] = []
    for sentence in _sentences(text):
        passage.append(sentence)
        words = sum(len(part.split()) for part in passage)
        while overlapping and len(passage) > 2 and words - len(passage[0].split()) >= fewest:
            words -= len(passage.pop(0).split())
        if words >= fewest:
            if len(passage) > 1 and words <= most:
                yield [*passage]
            passage = passage if overlapping else []


def _sentences(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from _SENTENCE_END.split(" ".join(paragraph.split()))


def _shuffled(items: Sequence[Any], draw: random.Random) -> list[Any]:
    return draw.sample(list(items), len(items))


def _others(pool: Sequence[Any], text: Any, right: set[str], draw: random.Random) -> list[str]:
    """Different wrong answers from a pool; fewer if the pool is too small."""
    found: list[str] = []
    for index in draw.sample(range(len(pool)), min(len(pool), 8 * CHOICES)):
        wrong = text(pool[index])
        if wrong not in right and wrong not in found:
            found.append(wrong)
        if len(found) == CHOICES - 1:
            break
    return found


def _choice(question: str, answer: str, others: list[str], draw: random.Random) -> Question:
    choices = _shuffled([answer, *others], draw)
    return {"question": question, "choices": choices, "answer": choices.index(answer)}


def _is_usual(synset: Synset) -> bool:
    """Whether texts use its first word in this sense, and it is not a name."""
    return synset.counts[0] > 0 and synset.words[0].islower()


def _ancestors(synset: Synset, by_offset: dict[int, Synset]) -> set[str]:
    """All words that are broader than its words, at any distance."""
    found, left = set[str](), [*synset.broader]
    seen: set[int] = set()
    while left:
        offset = left.pop()
        if offset in by_offset and offset not in seen:
            seen.add(offset)
            found |= set(by_offset[offset].words)
            left += by_offset[offset].broader
    return found


def _with_article(word: str) -> str:
    return f"{'An' if word[0].lower() in 'aeiou' else 'A'} {word}"
