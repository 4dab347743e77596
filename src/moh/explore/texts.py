"""A text under a language model at a share of heads: losses and heads of its tokens, the next token, time, the curve.

Only numbers; `parts` and `markup` show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
_ROWS = 128  # rows of logits at a time in float32: a vocabulary is large


@dataclass(frozen=True)
class TextReading:
    """One model's reading of a text of N tokens.

    Attributes:
        losses: N numbers, `-log p(token | those before it)` in nats; None for the first, which nothing predicts, and for
            all tokens of an encoder.
        next_tokens: the likeliest next tokens with their probabilities, the likeliest first; none from an encoder.
    """

    losses: list[float | None]
    next_tokens: list[tuple[str, float]]

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None for a single token, infinity on overflow."""
        known = [loss for loss in self.losses if loss is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class TextComparison:
    """A text, read by the model at a share of heads and by the reference.

    Attributes:
        ids: the N tokens.
        tokens: each token's part of the text.
        left_out: number of tokens beyond the limit, which were not read.
        model: the explored model's reading.
        reference: the reference's reading; None without one.
        share: share of the heads that a token used in the explored model.
        layers: what every head of the explored model did; empty if its attention is of an unknown kind.
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
    """Perplexity at a `value` of the dial, and the share of heads there."""

    value: int
    share: float
    perplexity: float


def read_text(subject: TextSubject, text: str, value: int | None) -> TextComparison:
    """Read a text with the model at a dial value, and with the reference.

    Args:
        subject: the model.
        text: any text; it is cut off after `subject.max_tokens` tokens.
        value: of `subject.dial`; None keeps the model's own setting.

    Raises:
        ValueError: the text is empty or has more than `MOST_CHARACTERS` characters, or the dial has no such value.
    """
    ids, tokens, left_out = _tokens(subject, text)
    batch = torch.tensor([ids], device=subject.model.device)
    with subject.at(value) as share:
        options = {"use_cache": False} if subject.predicts else {}
        output, layers = observed(subject.model, lambda: subject.model(input_ids=batch, **options))
        model = _reading(subject, output, ids)
        reference = None
        if subject.reference is not None:
            with subject.reference_at() as other, torch.no_grad():
                reference = _reading(subject, other(input_ids=batch, **options), ids)
    return TextComparison(ids, tokens, left_out, model, reference, share, layers)


def time_text(subject: TextSubject, ids: list[int], value: int | None) -> tuple[float, float | None]:
    """Seconds in which the model at a dial value reads the tokens and predicts the next, and the reference's.

    Raises:
        ValueError: the dial has no such value.
    """
    batch = torch.tensor([ids], device=subject.model.device)
    clock = device_clock(batch.device)
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1} if subject.predicts else {}

    def run(model: nn.Module) -> float:
        start = clock()
        model(input_ids=batch, **options)
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


def share_curve(
    subject: TextSubject, text: str, *, progress: Callable[[int, int], None] | None = None
) -> tuple[list[CurvePoint], float | None]:
    """Perplexity of a text at every value of the dial, and the reference's (None without one).

    Args:
        subject: the model.
        text: two tokens or more.
        progress: called after each value with the number done and the total.

    Raises:
        ValueError: the model is an encoder, the dial has no values, the text is too short, or as in `read_text`.
    """
    values = subject.dial.values
    if not subject.predicts:
        raise ValueError("This model predicts no next token, and so has no perplexity.")
    if not values:
        raise ValueError("This model has no share of heads to set, and so no curve.")
    ids, _, _ = _tokens(subject, text)
    if len(ids) < 2:
        raise ValueError("The text must have at least two tokens: nothing predicts the first.")
    points = []
    for done, value in enumerate(values, 1):
        with subject.at(value) as share:  # locked per value: other visitors get their turn in between
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
        raise ValueError(f"The text must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}.")
    ids, tokens = tokenise(subject.tokenizer, _well_formed(text), 8 * MOST_CHARACTERS)
    if not ids:
        raise ValueError("The tokenizer finds no token in this text.")
    most = subject.max_tokens
    return ids[:most], tokens[:most], max(0, len(ids) - most)


def _well_formed(text: str) -> str:
    """Join or replace halves of characters, which text from JSON may hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reading(subject: TextSubject, output: Any, ids: list[int]) -> TextReading:
    if not subject.predicts:
        return TextReading([None] * len(ids), [])
    logits, tokenizer = output.logits[0], subject.tokenizer
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
    """A token as text; a token that is part of a character, as in the vocabulary."""
    text = str(tokenizer.decode([token]))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
