"""The examples run, with small numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bf16", [False, True])
def test_nanogpt_learns_with_and_without_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bf16: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    words = "--layers 1 --heads 4 --width 32 --length 32 --batch 4 --steps 60 --share 0.75".split()
    nanogpt = load("nanogpt_moh")
    nanogpt.main([*words, "--text", str(text), "--output", str(tmp_path / "curves.png"), *["--bf16"] * bf16])
    lines = capsys.readouterr().out.splitlines()
    heldout = [float(line.split()[2]) for line in lines if "held-out" in line]
    assert len(heldout) == 2 and max(heldout) < 1.5  # a text of 13 letters: 2.4 without learning
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_nanogpt_gives_the_same_text_with_and_without_a_cache() -> None:
    import torch

    nanogpt = load("nanogpt_moh")
    for share in (None, 0.75):
        torch.manual_seed(0)
        model = nanogpt.GPT(11, layers=2, heads=4, width=32, share=share).eval()
        prompt = torch.randint(11, (2, 5))
        made = model.generate(prompt, 6, temperature=1e-4).clone()  # the likeliest letter
        for end in range(5, 11):  # without a cache
            assert torch.equal(model(made[:, :end])[:, -1].argmax(-1), made[:, end])
