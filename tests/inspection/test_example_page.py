"""Promise: what docs/tutorials/heads.md says of docs/heads.html is on that page."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

DOCS = Path(__file__).parents[2] / "docs"
MARKS = r"[,.:;]"
NOT_WORDS = r"\s*[\d()\[\]{}]+\s*|\s*\n\s*"  # digits, brackets, line breaks
FULL = [0, 1, 2, *range(10, 15), 16, 19]


class Page:
    """The page's tokens: which heads are active `[layers, tokens, heads]`, text, and group of each."""

    def __init__(self) -> None:
        text = (DOCS / "heads.html").read_text(encoding="utf-8")
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        active, self.tokens, self.groups = [], [], []
        for sample in json.loads(data)["samples"]:
            values = bytearray(zlib.decompress(base64.b64decode(sample["values"])))
            levels = torch.frombuffer(values, dtype=torch.uint8)
            gates = levels.view(len(sample["layers"]), 2, -1, len(sample["tokens"]))[:, 0]  # the others: contributions
            active.append(gates.transpose(1, 2) > 0)
            self.tokens += sample["tokens"]
            self.groups += [sample["group"]] * len(sample["tokens"])
        self.active = torch.cat(active, 1).double()

    def matching(self, pattern: str, *, stripped: bool = True) -> Tensor:
        return torch.tensor([bool(re.fullmatch(pattern, t.strip() if stripped else t)) for t in self.tokens])

    def uses(self, layer: int, head: int, tokens: Tensor) -> int:
        """Per cent of these tokens that use the head."""
        return round(100 * self.active[layer, tokens, head].mean().item())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest.fixture(scope="module")
def tutorial() -> str:
    return " ".join((DOCS / "tutorials" / "heads.md").read_text(encoding="utf-8").split())


def test_layers_differ(page: Page, tutorial: str) -> None:
    mean = page.active.sum(-1).mean(1)
    assert [layer for layer in range(30) if mean[layer] == 9] == FULL
    assert "In layers 0 to 2, 10 to 14, 16 and 19 the conversion kept all nine heads" in tutorial
    assert (
        f"in layer 28 a token uses {mean[28]:.1f} on average, in layers 24 and 27 {mean[24]:.1f} and {mean[27]:.1f}"
        in tutorial
    )


def test_tokens_differ(page: Page, tutorial: str) -> None:
    number = page.active[7].sum(-1)
    assert (number.min(), number.max()) == (2, 9) and "in layer 7 some use two, others all nine" in tutorial
    share = page.active.mean((0, 2))
    first = torch.tensor([i == 0 or page.groups[i] != page.groups[i - 1] for i in range(len(page.groups))])
    assert share[first].max() < share[~first].min()
    assert {round(100 * part) for part in share[first].tolist()} == {63} and "the fewest, 63 % of all heads" in tutorial
    marks = page.matching(MARKS)
    values = [round(100 * share[tokens].mean().item()) for tokens in (marks, ~marks & ~first)]
    assert "semicolons use {} %, the other tokens {} %".format(*values) in tutorial


def test_a_head_for_what_is_not_a_word(page: Page, tutorial: str) -> None:
    others, words = page.matching(NOT_WORDS, stripped=False), page.matching(r" [^\W\d_]+", stripped=False)
    assert page.uses(7, 0, others) == 100 and f"each of the {others.sum()} tokens of the four texts" in tutorial
    assert f"uses it, and {page.uses(7, 0, words)} % of the words that begin with a space" in tutorial


def test_a_head_for_punctuation(page: Page, tutorial: str) -> None:
    marks, code = page.matching(MARKS), torch.tensor([group == "code" for group in page.groups])
    assert page.uses(4, 7, marks) == 100 and f"all of the {marks.sum()} tokens that are a comma" in tutorial
    assert f"use it, and {page.uses(4, 7, ~marks)} % of the others" in tutorial
    assert f"uses it most ({page.uses(4, 7, code)} % of its tokens)" in tutorial


def test_a_head_for_french(page: Page, tutorial: str) -> None:
    of = {
        name: torch.tensor([group == name for group in page.groups]) for name in ("french", "story", "recipe", "code")
    }
    used = {name: page.uses(4, 5, tokens) for name, tokens in of.items()}
    text = "{french} % of the French tokens, {story} % of the story, {recipe} % of the recipe and {code} % of the code"
    assert text.format(**used) in tutorial
    french, *others = (page.uses(22, 6, tokens) for tokens in of.values())
    assert f"for {french} % of the French and {min(others)} to {max(others)} % of the others" in tutorial
