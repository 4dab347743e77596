"""The page in a real browser: it opens from disk, and leads from a token to its heads and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from page_cases import browser_page, random_layers, text_page_sample

from moh.inspection.page import PageSample, head_page

TOKENS = ["The", " sea", " was", "\n", " <script>", "alert(1)", "</script>", " שלום", " عليكم", " 👩‍👩‍👧", " sea", "·"]


def saved(tmp_path: Path, samples: list[PageSample]) -> str:
    head_page(samples, title="a <b>title</b>").save(tmp_path / "page.html")
    return (tmp_path / "page.html").as_uri()


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_person_can_use_it(tmp_path: Path, width: int, height: int) -> None:
    samples = [
        text_page_sample(TOKENS, [4, 6, 6], dense=(1,)),
        text_page_sample(["x"], [4, 6, 6], dense=(1,), name="two", group="other", seed=1),
    ]
    with browser_page(width, height) as (page, problems):
        page.goto(saved(tmp_path, samples))
        page.wait_for_selector("body[data-ready]")
        assert page.inner_text("#title") == "a <b>title</b>" and page.title() == "a <b>title</b>"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#text span").count() == len(TOKENS)
        assert page.locator("#text").text_content() == "".join(TOKENS).replace("\n", "↵\n")
        assert "1 of the layers are dense" in page.inner_text("#summary")

        page.hover("#text span:nth-child(2)")
        assert "“sea” (token 1)" in page.inner_text("#tip")
        page.click("#text span:nth-child(2)")
        used = sum(int((layer.gates[0, 1] > 0).sum()) for layer in samples[0].layers)
        assert f"uses {used} of 16 heads" in page.inner_text("#tokentitle")

        page.click('#map button[data-l="2"][data-h="3"]')
        gates = samples[0].layers[2].gates[0, :, 3]
        assert page.inner_text("#headtitle") == "Layer 2, head 3: routed"
        assert page.inner_text("#usestitle").startswith(f"{int((gates > 0).sum())} of {len(TOKENS)} tokens use it")
        page.click("#uses li:first-child button")
        assert f"(token {int(gates.argmax())})" in page.inner_text("#tokentitle")
        page.keyboard.press("Escape")
        assert page.is_hidden("#tokenpanel")

        page.keyboard.press("/")
        page.keyboard.type("SEA")
        assert page.inner_text("#found") == "2 found"
        page.keyboard.press("Enter")
        assert "(token 1)" in page.inner_text("#tokentitle")
        page.keyboard.press("Enter")
        assert "(token 10)" in page.inner_text("#tokentitle")
        page.keyboard.press("Escape")

        page.focus("#map button.chosen")
        page.keyboard.press("ArrowUp")
        assert page.inner_text("#headtitle") == "Layer 1, head 3: dense"
        page.check("input[name=value][value='1']")
        assert "contribution" in page.inner_text("#caption")
        page.click("#theme")
        page.select_option("#sample", "1")
        assert page.locator("#text span").count() == 1
    assert problems == []


def test_an_image_is_shaded_patch_by_patch(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray((torch.arange(28 * 28).view(28, 28) % 255).to(torch.uint8).numpy())
    layers = random_layers(17, [4, 4])  # a class token and 4 x 4 patches
    with browser_page() as (page, problems):
        page.goto(saved(tmp_path, [PageSample("digit", "digits", layers, image=image)]))
        page.wait_for_selector("body[data-ready]")
        page.click('#map button[data-l="1"][data-h="2"]')
        box = page.locator("#picture").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)  # first row, last column
        gate = float(layers[1].gates[0, 1 + 3, 2])
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.11)
        shown = page.inner_text("#tip").split("gate ")[1].split(",")[0]
        assert float(shown) == pytest.approx(gate, abs=0.005)
        page.focus("#picture")
        page.keyboard.press("ArrowDown")
        assert "the patch at" in page.inner_text("#tokentitle")
    assert problems == []


def test_2000_tokens_of_32_layers_and_32_heads_stay_smooth(tmp_path: Path) -> None:
    sample = text_page_sample(["word "] * 2_000, [32] * 32)
    with browser_page() as (page, problems):
        page.goto(saved(tmp_path, [sample]))
        page.wait_for_selector("body[data-ready]")
        milliseconds = page.evaluate(
            "() => { const start = performance.now(); for (let i = 0; i < 10; i++) choose(i, i);"
            " return (performance.now() - start) / 10 }"
        )
        assert milliseconds < 500  # about 20 on an idle machine: a bound for a hang, not a measurement
    assert problems == []
