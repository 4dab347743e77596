"""Promises of the page's file: one file, the model's exact numbers, no markup from the user, no outside address."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from page_cases import random_layers, text_page_sample

from moh.inspection.page import HeadPage, PageSample, head_page
from moh.inspection.page.samples import patch_grid

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)><!--"


def data_of(page: HeadPage) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(text)


def test_the_values_in_the_page_are_the_models_to_one_part_in_255() -> None:
    sample = text_page_sample(["a", "b", "c"], [4, 6])
    made = data_of(head_page([sample]))["samples"][0]
    levels = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(made["values"]))), dtype=torch.uint8)
    start = 0
    for layer, entry in zip(sample.layers, made["layers"], strict=True):
        for values, scale in zip((layer.gates[0], layer.contributions[0]), entry["scales"], strict=True):
            got = levels[start : start + values.numel()].view(values.shape[1], 3).T.float() / 255 * scale
            start += values.numel()
            assert (got - values).abs().max() <= scale / 255
            assert torch.equal(got != 0, values != 0), "what is used never becomes 0, nor the reverse"
    assert start == len(levels)


@pytest.mark.parametrize("where", ["token", "name", "group", "title"])
def test_what_the_user_gives_never_becomes_markup(where: str) -> None:
    plain = head_page([text_page_sample(["x"], [2])])
    options = {where: NASTY} if where in ("name", "group") else {}
    sample = text_page_sample([NASTY if where == "token" else "x"], [2], **options)
    page = head_page([sample], title=NASTY) if where == "title" else head_page([sample])
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.html.count(tag) == plain.html.count(tag)
    assert NASTY in json.dumps(data_of(page), ensure_ascii=False).replace('\\"', '"')


def test_the_page_names_no_outside_address() -> None:
    page = head_page([text_page_sample(["see https://example.org"], [2])]).html
    shell = page.replace(json.dumps("see https://example.org"), "")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"(?m)^\s*//.*$|\s// .*$", "", shell))
    assert "default-src 'none'" in page


def test_2000_tokens_of_32_layers_and_32_heads_stay_below_10_megabytes() -> None:
    sample = text_page_sample(["word "] * 2_000, [32] * 32)
    assert len(head_page([sample]).html.encode()) < 10_000_000


def test_a_notebook_gets_the_whole_page_in_a_frame() -> None:
    page = head_page([text_page_sample(['"quoted" & <tagged>'], [2])])
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and "<script" not in frame


def test_save_writes_the_file(tmp_path) -> None:
    page = head_page([text_page_sample(["日本語", "שלום"], [2])])
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html


@pytest.mark.parametrize(
    "tokens, aspect, expected",
    [
        (196, 1.0, (0, 14, 14)),
        (197, 1.0, (1, 14, 14)),
        (201, 1.0, (5, 14, 14)),
        (98, 2.0, (0, 7, 14)),
        (1, 1.0, (0, 1, 1)),
    ],
)
def test_patches_find_their_grid(tokens: int, aspect: float, expected: tuple[int, int, int]) -> None:
    assert patch_grid(tokens, aspect) == expected


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="samples must hold at least one input"):
        head_page([])
    with pytest.raises(ValueError, match="samples must come from one model, but 'two' has other layers"):
        head_page([text_page_sample(["x"], [2]), text_page_sample(["x"], [3], name="two")])
    with pytest.raises(ValueError, match="layers must hold one input of 2 tokens, got \\(1, 3\\)"):
        PageSample("x", "x", random_layers(3, [2]), tokens=["a", "b"])
    with pytest.raises(ValueError, match="needs either tokens or an image"):
        PageSample("x", "x", random_layers(3, [2]))
    with pytest.raises(ValueError, match=r"11 tokens are not laid out over an image 20\.00 times as wide"):
        patch_grid(11, 20.0)


@pytest.mark.parametrize("name", ["{{data}} {{script}} {{unknown}}", b"caf\xe9.txt".decode("utf-8", "surrogateescape")])
def test_a_name_may_look_like_a_place_of_the_template_or_not_be_utf_8(tmp_path: Path, name: str) -> None:
    sample = replace(text_page_sample(["x"], [2]), name=name)
    page = head_page([sample], title=name)
    page.save(tmp_path / "page.html")
    shown = name.encode(errors="replace").decode()
    assert data_of(page)["title"] == shown and data_of(page)["samples"][0]["name"] == shown
    assert f"<title>{shown}</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_documents_page_is_small_and_has_every_text() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = HeadPage((docs / "heads.html").read_text(encoding="utf-8"))
    assert len(page.html.encode()) <= 3_000_000
    assert [sample["group"] for sample in data_of(page)["samples"]] == ["story", "code", "recipe", "french"]
    assert "heads.html" in (docs / "index.md").read_text(encoding="utf-8")
    assert "docs/heads.html" in (docs.parent / "README.md").read_text(encoding="utf-8")
