"""Promises of the markup: text from outside never becomes markup, and the values shown are the computed ones."""

from __future__ import annotations

import re

import pytest
import torch

from moh.config import MoHConfig
from moh.explore import markup
from moh.inspection.trace import LayerTrace

EVIL = "<script>alert(1)</script>\"'&"


def dense_and_routed() -> list[LayerTrace]:
    gates = torch.tensor([[[1.0, 0.0, 0.5]]])
    return [LayerTrace("a", None, gates, gates), LayerTrace("b", MoHConfig(3, (1,), 1), gates, gates)]


@pytest.mark.parametrize(
    "made",
    [
        markup.notice(EVIL),
        markup.heading(EVIL, EVIL),
        markup.table([EVIL], [(EVIL, [EVIL])]),
        markup.bars(EVIL, [(EVIL, 0.5)]),
        markup.shaded_tokens([EVIL, EVIL], [None, 1.0], [None, 2.0], difference=True, chosen=1),
        markup.head_map(EVIL, dense_and_routed(), [torch.rand(3)] * 2, said=EVIL, choosable=True),
    ],
    ids=["notice", "heading", "table", "bars", "tokens", "map"],
)
def test_words_from_outside_never_become_markup(made: str) -> None:
    assert "alert(1)" in made and "<script" not in made
    assert not re.search(r"\"'&(?!amp|quot|lt|gt|#)", made)


def test_tokens_are_shaded_by_loss_or_by_the_difference() -> None:
    losses, other = [None, 5.0, 1.0], [None, 4.0, 1.5]
    shaded = markup.shaded_tokens(["a", "b", "c"], losses, other, difference=False, chosen=None)
    assert re.findall(r"rgb\((.*?) / ([\d.]+)\)", shaded) == [("213 94 0", "0.360"), ("213 94 0", "0.072")]
    shaded = markup.shaded_tokens(["a", "b", "c"], losses, other, difference=True, chosen=None)
    assert re.findall(r"rgb\((.*?) / ([\d.]+)\)", shaded) == [("213 94 0", "0.360"), ("0 114 178", "0.180")]
    assert "the first token: nothing predicts it" in shaded


def test_the_chosen_token_is_marked_and_the_one_stop_of_the_tab_key() -> None:
    shaded = markup.shaded_tokens(["a", "b"], [None, 1.0], None, difference=False, chosen=1)
    assert re.findall(r'tabindex="(-?\d)" data-token="(\d)"', shaded) == [("-1", "0"), ("0", "1")]
    assert shaded.count("aria-pressed") == 1


def test_the_map_marks_shared_heads_and_dense_layers() -> None:
    made = markup.head_map("t", dense_and_routed(), [torch.tensor([0.5, 0.0, 2.0])] * 2, said="gate")
    assert re.findall(r'title="(layer \d, head \d \(\w+\)): gate ([\d.]+)">(\w?)<', made) == [
        ("layer 0, head 0 (dense)", "0.50", "D"),
        ("layer 0, head 1 (dense)", "0.00", "D"),
        ("layer 0, head 2 (dense)", "2.00", "D"),
        ("layer 1, head 0 (routed)", "0.50", ""),
        ("layer 1, head 1 (shared)", "0.00", "S"),
        ("layer 1, head 2 (routed)", "2.00", ""),
    ]
    assert "1 of 2 layers" in made and "--v:1.000" in made  # the largest value is the bluest


def test_a_model_of_unknown_attention_has_no_map() -> None:
    assert "not shown" in markup.head_map("t", [], [], said="load")


@pytest.mark.parametrize(
    "value, said",
    [(None, "–"), (3.14159, "3.142"), (123_456.0, "123,456"), (float("inf"), "∞"), (float("nan"), "not a number")],
)
def test_numbers_are_short(value: float | None, said: str) -> None:
    assert markup.number(value) == said


def test_white_space_of_a_predicted_token_is_visible() -> None:
    assert ">␣the↵<" in markup.bars("t", [(" the\n", 1.0)])
