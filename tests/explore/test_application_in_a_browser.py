"""The application in a real browser: no requests to other machines, and usable on a desktop and on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gradio", reason="the app extra is not installed")

from page_cases import browser_page

from moh.explore.interface import build, serve
from moh.explore.subjects import ImageSubject, TextSubject, load_subject

SIZES = pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])


@contextmanager
def opened(
    subject: TextSubject | ImageSubject, width: int = 1280, height: int = 900
) -> Iterator[tuple[Any, list[str]]]:
    """A browser's page on the application of a model, and its list of problems."""
    app = build(subject)
    address = serve(app, wait=False)
    try:
        with browser_page(width, height, address=address) as (page, problems):
            page.set_default_timeout(60_000)  # test machines are busy
            page.goto(address)
            yield page, problems
    finally:
        app.close(verbose=False)


def complaints(problems: list[str]) -> list[str]:
    """Problems without Gradio's own warnings: its plot's library version, its upload's end."""
    return [
        p for p in problems if not p.startswith("WARN The input spec uses Vega-Lite") and p != "Method not implemented."
    ]


def text_of(page: Any, selector: str, pattern: str) -> str:
    """The element's text, once it matches the pattern."""
    page.wait_for_function(
        "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.innerText ?? '')",
        arg=[selector, pattern],
    )
    return str(page.inner_text(selector))


def assert_whole_table(page: Any, selector: str) -> None:
    """No cell reaches over the table's edge, and no text over its cell's."""
    cut = page.evaluate(
        """selector => {
            const edge = document.querySelector(selector).getBoundingClientRect().right + 1
            const cells = [...document.querySelectorAll(`${selector} [role=gridcell], ${selector} [role=columnheader]`)]
            const cut = cell => cell.getBoundingClientRect().right > edge || cell.scrollWidth > cell.clientWidth + 1
            return cells.length ? cells.filter(cut).map(cell => cell.innerText) : ["no cells"]
        }""",
        selector,
    )
    assert cut == []


def set_dial(page: Any, value: int) -> None:
    page.locator("#dial input[type=range]").fill(str(value))


def test_a_text_is_read_at_the_share_that_the_slider_says(text_subject: TextSubject) -> None:
    with opened(text_subject) as (page, problems):
        text_of(page, "#summary", "50 % of the heads")
        page.locator("#text textarea").fill("<script>alert(1)</script> ${1+1} {{7*7}} the שלום 👩‍👩‍👧 a head")
        page.click("#read")
        text_of(page, "#tokens", "script")
        assert page.inner_text("#tokens") == "<script>alert(1)</script> ${1+1} {{7*7}} the שלום 👩‍👩‍👧 a head"
        before = text_of(page, "#summary", r"\d ms\s")
        set_dial(page, 2)
        after = text_of(page, "#summary", r"75 % of the heads[\s\S]*\d ms\s")
        perplexities = [re.search(r"perplexity\s+(\S+)\s+(\S+)", summary).groups() for summary in (before, after)]
        assert perplexities[0][0] != perplexities[1][0] and perplexities[0][1] == perplexities[1][1]
        page.click("#tokens [data-token='3']")
        assert "uses 6 of 8 heads" in text_of(page, "#heads", "Token 3")
    assert complaints(problems) == []


@pytest.mark.slow
@SIZES
def test_a_person_can_use_all_of_it(text_subject: TextSubject, width: int, height: int) -> None:
    with opened(text_subject, width, height) as (page, problems):
        text_of(page, "#summary", r"\d ms\s")
        assert_whole_table(page, "#summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.focus("#tokens [data-token='0']")
        for _ in range(2):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        text_of(page, "#heads", "Token 2")
        page.get_by_label("difference").check()
        page.wait_for_function("document.querySelector('#tokens').innerHTML.includes('0 114 178')")
        assert page.get_attribute("#tokens [data-token='2']", "aria-pressed") == "true"
        page.get_by_role("tab", name="Next token").click()
        page.wait_for_selector("#next meter")
        assert page.locator("#next meter").count() == page.locator("#next-of-reference meter").count() == 10
        page.get_by_role("tab", name="All shares").click()
        page.click("#draw")
        assert text_of(page, "#figures", "3 routed heads").count("routed heads") == 4
        page.wait_for_selector("#curve canvas, #curve svg")
        page.locator("#text textarea").fill(" ")
        page.click("#read")
        assert text_of(page, "#problem", "Type") == "Type a text first."
        page.locator("#text textarea").fill("head " * 70)
        page.click("#read")
        text_of(page, "#problem", "64 tokens are read, 6 are left out")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints(problems) == []


@pytest.mark.slow
@SIZES
def test_an_image_is_classified_and_its_patches_are_shown(
    image_subject: ImageSubject, tmp_path: Path, width: int, height: int
) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (30, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).convert("RGBA").save(tmp_path / "image.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with opened(image_subject, width, height) as (page, problems):
        page.locator("#image input[type=file]").set_input_files(tmp_path / "image.png")
        before = text_of(page, "#classes", "%")
        assert page.locator("#classes meter").count() == page.locator("#classes-of-reference meter").count() == 5
        text_of(page, "#summary", r"\d ms\s")
        assert_whole_table(page, "#summary")
        shown = page.get_attribute("#patches img", "src")
        page.click("#heads [data-l='1'][data-h='1']")
        text_of(page, "#patches", "Layer 1, head 1")
        page.keyboard.press("ArrowRight")
        assert page.get_attribute("#heads .chosen", "data-h") == "2"
        text_of(page, "#patches", "Layer 1, head 2")
        assert page.get_attribute("#patches img", "src") != shown
        set_dial(page, 1)
        page.wait_for_function("old => document.querySelector('#classes').innerText !== old", arg=before)
        text_of(page, "#patches", "Layer 1, head 2")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#image button[aria-label='Clear'], #image [aria-label='Remove Image'], #image [title='Clear']")
        page.locator("#image input[type=file]").set_input_files(tmp_path / "deep.png")
        assert "more than 8 bits" in text_of(page, "#problem", "can't be read")
    assert complaints(problems) == []


@pytest.mark.slow
def test_moving_the_slider_leaves_the_share_that_was_saved(text_subject: TextSubject, tmp_path: Path) -> None:
    text_subject.model.set_active_heads([1, 3])
    text_subject.model.save_pretrained(tmp_path)
    text_subject.tokenizer.save_pretrained(tmp_path)
    with opened(load_subject(tmp_path)) as (page, problems):
        text_of(page, "#summary", r"75 % of the heads[\s\S]*\d ms")
        box = page.get_by_label("As saved: 1 to 3, layer by layer")
        assert box.is_checked()
        set_dial(page, 1)
        text_of(page, "#summary", r"50 % of the heads[\s\S]*\d ms")
        assert not box.is_checked()
        box.check()
        text_of(page, "#summary", r"75 % of the heads")
    assert complaints(problems) == []


@pytest.mark.slow
def test_a_dense_model_has_no_slider(dense_dir: Path) -> None:
    subject = load_subject(dense_dir)
    with opened(subject) as (page, problems):
        assert "A dense model" in text_of(page, "#about", "dense")
        text_of(page, "#summary", r"this model, dense[\s\S]*\d ms")
        assert page.locator("#dial").count() == 0 or page.is_hidden("#dial")
        assert page.get_by_role("tab", name="All shares").count() == 0
        assert "2 of 2 layers are dense" in text_of(page, "#heads", "dense")
        assert page.get_attribute("#heads .cell", "title") == "layer 0, head 0, dense, load 1.00"
    assert complaints(problems) == []


def test_nothing_is_asked_of_another_machine(text_subject: TextSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    here = ("127.0.0.1", "localhost", "::1", None)
    asked: list[object] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in here:
            asked.append(address)
        return connect(self, address)

    def watched_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in here:
            asked.append(host)
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_look_up)
    app = build(text_subject)
    serve(app, wait=False)
    app.close(verbose=False)
    assert asked == []
