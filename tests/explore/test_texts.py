"""Promises about texts: numbers equal a direct computation, shares don't mix, unreadable texts give clear errors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import moh
from moh.evaluation import perplexity
from moh.explore.subjects import TextSubject, load_subject
from moh.explore.texts import MOST_CHARACTERS, TextComparison, read_text, share_curve, time_text

TEXT = "the router sees a token and picks value or key . the gate weighs a head"


def direct_losses(model: torch.nn.Module, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()


@pytest.mark.parametrize("value", [0, 1, 3])
def test_losses_and_perplexity_are_those_of_the_model_at_the_share(text_subject: TextSubject, value: int) -> None:
    found = read_text(text_subject, TEXT, value)
    model = text_subject.model
    with moh.active_heads(model, value):
        expected = direct_losses(model, found.ids)
        block = perplexity(model, torch.tensor([found.ids]), progress=False)
    assert found.model.losses[0] is None
    assert found.model.losses[1:] == pytest.approx(expected, rel=1e-5)
    assert found.model.perplexity == pytest.approx(block.perplexity, rel=1e-5)
    assert found.share == pytest.approx((1 + value) / 4)
    assert "".join(found.tokens) == TEXT


def test_without_a_dense_model_all_heads_stand_for_it(text_subject: TextSubject, dense_dir: Path) -> None:
    found = read_text(text_subject, TEXT, 0)
    dense = load_subject(dense_dir).model
    assert text_subject.reference is not None and text_subject.reference.label == "all heads active"
    assert found.reference is not None
    assert found.reference.losses[1:] == pytest.approx(direct_losses(dense, found.ids), rel=1e-4)
    assert found.reference.losses[1:] != pytest.approx(found.model.losses[1:], rel=1e-2)


def test_the_dense_model_is_read_beside_it(converted_dir: Path, dense_dir: Path) -> None:
    subject = load_subject(converted_dir, dense=dense_dir)
    assert isinstance(subject, TextSubject) and subject.reference is not None
    assert subject.reference.label == "dense (dense)"
    found = read_text(subject, TEXT, 3)
    assert found.reference is not None
    assert found.reference.losses[1:] == pytest.approx(found.model.losses[1:], rel=1e-4)


def test_the_likeliest_next_tokens_come_first(text_subject: TextSubject) -> None:
    found = read_text(text_subject, TEXT, 1)
    with torch.no_grad():
        p = text_subject.model(torch.tensor([found.ids])).logits[0, -1].softmax(-1)
    names = text_subject.tokenizer.convert_ids_to_tokens(p.argsort(descending=True)[:10].tolist())
    assert [name for name, _ in found.model.next_tokens] == names
    assert [value for _, value in found.model.next_tokens] == pytest.approx(
        p.sort(descending=True).values[:10].tolist()
    )


def test_every_token_uses_as_many_heads_as_the_dial_says(text_subject: TextSubject) -> None:
    for value in (0, 2):
        layers = read_text(text_subject, TEXT, value).layers
        assert len(layers) == 2
        assert all((layer.gates[0] > 0).sum(-1).eq(1 + value).all() for layer in layers)


def test_a_dense_model_is_shown_as_what_it_is(dense_dir: Path) -> None:
    subject = load_subject(dense_dir)
    assert isinstance(subject, TextSubject)
    assert subject.facts.startswith("A dense model") and subject.reference is None
    found = read_text(subject, TEXT, None)
    assert found.reference is None and found.share == 1
    assert [layer.config for layer in found.layers] == [None, None]
    with pytest.raises(ValueError, match="no share of heads to set"):
        share_curve(subject, TEXT)


@pytest.mark.parametrize(
    "text",
    ["שלום עולם", "👩‍👩‍👧 naïve\u0301 \u202eevil", "\ud83d the", "<script>alert(1)</script>", "the\r\n\tthe\x00"],
    ids=["right-to-left", "joined-emoji-and-marks", "half-a-character", "markup", "control-characters"],
)
def test_unusual_text_is_read(text_subject: TextSubject, text: str) -> None:
    found = read_text(text_subject, text, 1)
    assert len(found.tokens) == len(found.ids) == len(found.model.losses)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "Type a text first"),
        (" \n", "Type a text first"),
        ("a" * (MOST_CHARACTERS + 1), "at most 20,000 characters, got 20,001"),
    ],
    ids=["empty", "blank", "too-long"],
)
def test_what_cannot_be_read_is_said(text_subject: TextSubject, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_text(text_subject, text, 1)


def test_tokens_beyond_the_model_are_left_out_and_counted(text_subject: TextSubject) -> None:
    assert text_subject.max_tokens == 64  # the tiny model's number of positions
    found = read_text(text_subject, "head " * 70, 1)
    assert len(found.ids) == 64 and found.left_out == 6


def test_a_single_token_has_no_perplexity_but_a_next_one(text_subject: TextSubject) -> None:
    found = read_text(text_subject, "head", 1)
    assert found.model.losses == [None] and found.model.perplexity is None
    assert len(found.model.next_tokens) == 10
    with pytest.raises(ValueError, match="at least two tokens"):
        share_curve(text_subject, "head")


def test_the_curve_is_the_perplexity_at_each_share(text_subject: TextSubject) -> None:
    seen: list[tuple[int, int]] = []
    points, reference = share_curve(text_subject, TEXT, progress=lambda *done: seen.append(done))
    assert [point.value for point in points] == [0, 1, 2, 3]
    assert [point.share for point in points] == [0.25, 0.5, 0.75, 1.0]
    for point in points:
        assert point.perplexity == pytest.approx(read_text(text_subject, TEXT, point.value).model.perplexity, rel=1e-5)
    assert reference == pytest.approx(points[-1].perplexity, rel=1e-5)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert text_subject.dial.counts() == [1, 1]


def test_visitors_at_once_each_get_their_own_share(text_subject: TextSubject) -> None:
    values = [0, 3, 1, 2] * 6
    alone = {value: read_text(text_subject, TEXT, value) for value in set(values)}

    def ask(value: int) -> TextComparison:
        return read_text(text_subject, TEXT, value)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, values))
    for value, answer in zip(values, answers, strict=True):
        assert answer.model.losses[1:] == pytest.approx(alone[value].model.losses[1:], rel=1e-5)
        assert answer.share == alone[value].share
    assert text_subject.dial.counts() == [1, 1]


def test_times_are_measured_for_both(text_subject: TextSubject, dense_dir: Path) -> None:
    ids = read_text(text_subject, TEXT, 1).ids
    own, other = time_text(text_subject, ids, 1)
    assert own > 0 and other is not None and other > 0
    dense = load_subject(dense_dir)
    assert isinstance(dense, TextSubject)
    assert time_text(dense, ids, None)[1] is None


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    from moh.explore.texts import TextReading

    assert TextReading([None, 2_000.0], []).perplexity == math.inf
