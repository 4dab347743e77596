"""Promises of the markup: text from outside never becomes markup, and the values shown are the computed ones."""

from __future__ import annotations

import re

import pytest

from moh.explore import markup

EVIL = "<script>alert(1)</script>\"'&"


@pytest.mark.parametrize(
    "made",
    [
        markup.notice(EVIL),
        markup.heading(EVIL, EVIL),
        markup.shaded_tokens([EVIL, EVIL], [None, 1.0], [None, 2.0], difference=True, chosen=1),
    ],
    ids=["notice", "heading", "tokens"],
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
