"""A text under a language model at some budget: loss of each token, the next one, its heads, the time; and the curve.

Numbers alone: how they look is in `markup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moh.evaluation.speed import device_clock
from moh.explore.observing import median_seconds, observed
from moh.explore.subjects import TextSubject
from moh.inspection.page.samples import tokenise
from moh.inspection.trace import LayerTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEXT_TOKENS = 10
MOST_CHARACTERS = 20_000
_ROWS = 128  # of logits at a time in float32: a vocabulary is large


@dataclass(frozen=True)
class TextReading:
    """What one model makes of a text of N tokens.

    Attributes:
        losses: N numbers, `-log p(token | those before it)` in nats; None for the first, which nothing predicts.
        next_tokens: the likeliest next tokens with their probabilities, the likeliest first.
    """

    losses: list[float | None]
    next_tokens: list[tuple[str, float]]

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None for a single token, infinity where a float holds no more."""
        known = [loss for loss in self.losses if loss is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class TextComparison:
    """A text, read by the model at a budget and by what it is compared with.

    Attributes:
        ids: the N tokens.
        tokens: the part of the text that each stands for.
        left_out: how many tokens of the text were too many.
        model: the explored model's reading.
        reference: the reference's; None if there is none.
        share: share of the heads that a token used in the explored model.
        layers: what every head of the explored model did; empty where its attention is of an unknown kind.
    """

    ids: list[int]
    tokens: list[str]
    left_out: int
    model: TextReading
    reference: TextReading | None
    share: float
    layers: list[LayerTrace]


@dataclass(frozen=True)
class CurvePoint:
    """Perplexity at a budget: `value` of the dial, the share of heads that it means."""

    value: int
    share: float
    perplexity: float


def read_text(subject: TextSubject, text: str, value: int | None) -> TextComparison:
    """Read a text with the model at a budget, and with what it is compared with.

    Args:
        subject: the model.
        text: anything; what is beyond `subject.max_tokens` tokens is left out.
        value: of `subject.dial`; None is the model's own budget.

    Raises:
        ValueError: the text is empty or has more than `MOST_CHARACTERS` characters, or the dial has no such value.
    """
    ids, tokens, left_out = _tokens(subject, text)
    batch = torch.tensor([ids], device=subject.model.device)
    with subject.at(value) as share:
        output, layers = observed(subject.model, lambda: subject.model(input_ids=batch, use_cache=False))
        model = _reading(output.logits[0], ids, subject.tokenizer)
        reference = None
        if subject.reference is not None:
            with subject.reference_at() as other, torch.no_grad():
                logits = other(input_ids=batch, use_cache=False).logits[0]
                reference = _reading(logits, ids, subject.tokenizer)
    return TextComparison(ids, tokens, left_out, model, reference, share, layers)


def time_text(subject: TextSubject, ids: list[int], value: int | None) -> tuple[float, float | None]:
    """Seconds in which the model at a budget reads the tokens up to the next one's prediction, and the reference's.

    Raises:
        ValueError: the dial has no such value.
    """
    batch = torch.tensor([ids], device=subject.model.device)
    clock = device_clock(batch.device)

    def run(model: nn.Module) -> float:
        start = clock()
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
        return clock() - start

    def run_reference() -> float:
        with subject.reference_at() as other:
            return run(other)

    runs: list[Callable[[], float]] = [lambda: run(subject.model)]
    if subject.reference is not None:
        runs.append(run_reference)
    with subject.at(value), torch.no_grad():
        seconds = median_seconds(runs)
    return seconds[0], seconds[1] if len(seconds) > 1 else None


def budget_curve(
    subject: TextSubject, text: str, *, progress: Callable[[int, int], None] | None = None
) -> tuple[list[CurvePoint], float | None]:
    """Perplexity of a text at every budget of the dial, and the reference's (None without one).

    Args:
        subject: the model.
        text: of two tokens or more.
        progress: called after each budget with how many are done and how many there are.

    Raises:
        ValueError: the model has no budgets, or the text is too short, or as `read_text`.
    """
    values = subject.dial.values
    if not values:
        raise ValueError("This model has no budget to set, and so no curve.")
    ids, _, _ = _tokens(subject, text)
    if len(ids) < 2:
        raise ValueError("The text must have at least two tokens: nothing predicts the first.")
    points = []
    for done, value in enumerate(values, 1):
        with subject.at(value) as share:  # one budget at a time: others get their turn between them
            points.append(CurvePoint(value, share, _perplexity(subject, ids, subject.model)))
        if progress is not None:
            progress(done, len(values))
    reference = None
    if subject.reference is not None:
        with subject.at(None), subject.reference_at() as other:
            reference = _perplexity(subject, ids, other)
    return points, reference


def _tokens(subject: TextSubject, text: str) -> tuple[list[int], list[str], int]:
    if not text.strip():
        raise ValueError("Type a text first.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"The text must have at most {MOST_CHARACTERS:,} characters, and it has {len(text):,}.")
    ids, tokens = tokenise(subject.tokenizer, _well_formed(text), 8 * MOST_CHARACTERS)
    if not ids:
        raise ValueError("The tokenizer makes no token of this text.")
    most = subject.max_tokens
    return ids[:most], tokens[:most], max(0, len(ids) - most)


def _well_formed(text: str) -> str:
    """A text that came as JSON may hold halves of characters, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reading(logits: Tensor, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> TextReading:
    top = logits[-1].float().softmax(-1).topk(min(NEXT_TOKENS, logits.shape[-1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    losses: list[float | None] = [None, *_losses(logits, ids).tolist()]
    return TextReading(losses, [(_written(tokenizer, token), p) for token, p in likeliest])


def _losses(logits: Tensor, ids: list[int]) -> Tensor:
    """`[N - 1]` float32."""
    if len(ids) < 2:
        return torch.zeros(0)
    targets = torch.tensor(ids[1:], device=logits.device).split(_ROWS)
    parts = zip(logits[:-1].split(_ROWS), targets, strict=True)
    return torch.cat([F.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in parts])


@torch.no_grad()
def _perplexity(subject: TextSubject, ids: list[int], model: nn.Module) -> float:
    batch = torch.tensor([ids], device=subject.model.device)
    losses = _losses(model(input_ids=batch, use_cache=False).logits[0], ids)
    return float(losses.double().mean().exp())


def _written(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; one that is part of a character as the vocabulary writes it."""
    text = str(tokenizer.decode([token]))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
