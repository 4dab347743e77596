"""Samples for the tests of the page, and a browser that opens it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moh.config import MoHConfig
from moh.inspection.page import PageSample
from moh.inspection.trace import LayerTrace


def random_layers(tokens: int, heads: list[int], *, dense: tuple[int, ...] = (), seed: int = 0) -> list[LayerTrace]:
    """Layers with one shared head; each token uses half of the others at random."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, count in enumerate(heads):
        config = None if index in dense else MoHConfig(count, 1, (count - 1) // 2)
        gates = torch.rand(1, tokens, count, generator=generator)
        if config is not None:
            gates *= torch.rand(1, tokens, count, generator=generator) < 0.5
            gates[..., 0] = 1.0
        else:
            gates = torch.ones_like(gates)
        layers.append(LayerTrace(f"layers.{index}", config, gates, gates * 3))
    return layers


def text_page_sample(tokens: list[str], heads: list[int], **options: Any) -> PageSample:
    name = options.pop("name", "one")
    group = options.pop("group", "texts")
    return PageSample(name, group, random_layers(len(tokens), heads, **options), tokens=tokens)


@contextmanager
def browser_page(width: int = 1280, height: int = 900, *, address: str = "") -> Iterator[tuple[Any, list[str]]]:
    """A page of the system's Chromium and its list of problems; skips the test without Chromium.

    A network request is a problem, unless it goes to `address`.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(20_000)
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        allowed = (address, address.replace("http", "ws")) if address else ()
        outside = lambda url: url.startswith(("http", "ws")) and not url.startswith(allowed)  # noqa: E731
        page.on("request", lambda r: problems.append(r.url) if outside(r.url) else None)
        yield page, problems
        browser.close()
