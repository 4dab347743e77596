"""Needles in real text for `long_texts.py`: sentences with a fact of their own, and a question about each at the end.

A haystack is running text with one needle at each of five depths, "The secret word of Oslo is copper.", each with a city and
a word of its own. Behind the text its beginning, "The secret word of Oslo is", is to be continued. The wrong answers
are the words of the other needles, so that the model has to find the right city and not only a needle. A model reads the text
once and answers each question from a copy of the cache.
"""

from __future__ import annotations

import copy
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moh.data.text.blocks import start_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needles are, as parts of the text: behind the sentence that ends nearest; the last one at the end of the text."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?=\n\n)")
_NEEDLE = " The secret word of {} is"
_CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Tokyo Cairo Lima Boston Chicago Denver Sydney Moscow Delhi "
    "Athens Lisbon Warsaw Geneva Toronto Montreal Havana Nairobi Seoul Beijing"
).split()
_WORDS = (
    "tiger apple river piano copper garden silver window castle bridge coffee winter summer guitar rabbit dragon lemon orange "
    "pepper velvet marble rocket mirror candle cotton diamond engine forest island jacket kitchen ladder magnet ocean pencil "
    "planet ribbon saddle temple turtle violin wagon zebra anchor basket blanket camera desert hammer honey iron jungle lion "
    "mountain potato salmon"
).split()


@dataclass(frozen=True)
class Haystack:
    """A text with needles.

    Attributes:
        ids: `[1, N]` token ids of the text.
        questions: for each depth, the token ids `[1, n]` that its answer follows.
        answers: `[depths]` token ids of the right answers; each question's wrong answers are the others.
    """

    ids: Tensor
    questions: list[Tensor]
    answers: Tensor


def haystacks(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int = 0
) -> list[Haystack]:
    """Texts with needles, which begin at places spread evenly over the documents.

    Args:
        documents: running text; the texts run on from one document to the next.
        tokenizer: of all models that are compared.
        length: tokens of a text together with a question and its answer.
        count: texts.
        seed: of the cities and words.

    Raises:
        ValueError: the documents are too short, `length` has no room for the needles, or fewer cities or words are single
            tokens than a text needs.
    """

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    pieces = tokens([piece for text in documents for piece in _SENTENCE_END.split(f"\n\n{text}") if piece])
    starts = list(accumulate(map(len, pieces), initial=0))
    cities, words = (
        [ids for ids in tokens([f" {name}" for name in names]) if len(ids) == 1] for names in (_CITIES, _WORDS)
    )
    if min(len(cities), len(words)) < len(DEPTHS):
        raise ValueError(
            f"the tokenizer must have at least {len(DEPTHS)} of the cities and of the words as single tokens, got {len(cities)} "
            f"and {len(words)}"
        )
    before, after, full_stop = tokens([*_NEEDLE.split("{}"), "."])
    begin = start_tokens(tokenizer)
    question = len(before) + 1 + len(after)  # tokens of a question; a needle has its answer and a full stop too
    room = length - len(begin) - question - 1 - len(DEPTHS) * (question + 1 + len(full_stop))
    if room < 2 * len(DEPTHS):
        raise ValueError(f"length must leave room for text between {len(DEPTHS)} needles, got {length}")
    if starts[-1] < room:
        raise ValueError(f"the documents hold {starts[-1]} tokens, too few for one text of {room}")
    draw, made = random.Random(seed), []
    for i in range(count):
        first = bisect_right(starts, (starts[-1] - room) * i / count) - 1
        last = next(n for n in range(first, len(starts)) if starts[n] - starts[first] >= room)
        text = [token for piece in pieces[first:last] for token in piece][:room]
        ends = [end - starts[first] for end in starts[first + 1 : last]]
        questions = [[*before, *city, *after] for city in draw.sample(cities, len(DEPTHS))]
        answers = [word for (word,) in draw.sample(words, len(DEPTHS))]
        ids, done = [*begin], 0
        for depth, asked, answer in zip(DEPTHS, questions, answers, strict=True):
            aim = depth * room
            near = [end for end in ends if abs(end - aim) <= room / 8]
            place = room if depth == 1 else min(near, key=lambda end: abs(end - aim), default=round(aim))
            ids += [*text[done:place], *asked, answer, *full_stop]
            done = place
        made.append(Haystack(torch.tensor([ids]), [torch.tensor([q]) for q in questions], torch.tensor(answers)))
    return made


@dataclass(frozen=True)
class Answers:
    """What a model answered to the questions of one haystack, one entry per depth.

    Attributes:
        chosen: the right word is the likeliest of the needles' words.
        written: the right word is the likeliest of all tokens.
        margins: log-likelihood of the right word minus that of the likeliest wrong one.
    """

    chosen: list[bool]
    written: list[bool]
    margins: list[float]


@torch.no_grad()
def ask(model: PreTrainedModel, haystack: Haystack) -> Answers:
    """Let a model read the text once and answer each question."""
    answers = haystack.answers
    read = model(input_ids=haystack.ids, use_cache=True, logits_to_keep=1).past_key_values
    found: list[tuple[bool, bool, float]] = []
    for right, question in enumerate(haystack.questions):
        # a copy: layers with a sliding window can't be cropped back to the end of the text
        logits = model(input_ids=question, past_key_values=copy.deepcopy(read), logits_to_keep=1).logits[0, -1].float()
        scores = logits.log_softmax(-1)
        margin = float(scores[answers[right]] - scores[answers[torch.arange(len(answers)) != right]].max())
        found.append((margin > 0, int(scores.argmax()) == int(answers[right]), margin))
    chosen, written, margins = zip(*found, strict=True)
    return Answers(list(chosen), list(written), list(margins))
