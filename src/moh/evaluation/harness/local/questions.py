"""Questions out of texts: from a dictionary (WordNet) and from running text, always the same from the same text.

Not for reading those texts nor for the harness's task files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moh.evaluation.harness.local.wordnet import Synset

Question = dict[str, Any]

CHOICES = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORDS_OF_CONTEXT = (30, 120)  # long enough to guess the end by, short enough for small models


def definitions(synsets: Sequence[Synset], *, count: int, seed: int = 0) -> list[Question]:
    """Which of four definitions, all from the same field of meaning, is that of a word that texts really use."""
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
        # "a hot dog is a kind of dog" and such can be told from the letters alone
        others = _others(fields[synset.field], broader, true, draw)
        if _is_usual(synset) and len(others) == CHOICES - 1 and answer.lower() not in synset.words[0].lower():
            found.append(_choice(f"{_with_article(synset.words[0])} is a kind of", answer, others, draw))
        if len(found) == count:
            break
    return found


def opposites(synsets: Sequence[Synset], *, count: int, seed: int = 0) -> list[Question]:
    """The opposite of an adjective, to be written; any of them is right where there are several. Each pair is asked once."""
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
    """The last word of a sentence, which the text before it holds already: to be predicted from all of it."""
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
    """Consecutive sentences of a document, two or more with about a hundred words; overlapping ones begin at each."""
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
    """Wrong answers out of a pool: different ones, none of them right; fewer if the pool hasn't enough."""
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
    """Whether texts use its first word in this sense, and it is no name."""
    return synset.counts[0] > 0 and synset.words[0].islower()


def _ancestors(synset: Synset, by_offset: dict[int, Synset]) -> set[str]:
    """All words that are broader than a word, at any distance."""
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
