"""Promise: heads are drawn from layers that have both kinds, and the page compares them, seed by seed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the vision extra is not installed")

import shared_heads

from moh import MoHConfig

LAYERS = [MoHConfig(4, 1, 2), None, MoHConfig(4, 4, 0), MoHConfig(4, 2, 2), MoHConfig(4, [1, 3], 1), MoHConfig(4, 0, 2)]


def test_every_head_of_layers_with_both_kinds() -> None:
    assert shared_heads.drawn(LAYERS, None) == [(place, head) for place in (0, 4) for head in range(4)]


def test_a_seed_draws_one_head_of_either_kind_from_every_third_layer() -> None:
    layers = LAYERS[4:5] * 6
    drawn = [shared_heads.drawn(layers, seed) for seed in range(8)]
    assert all([place for place, _ in heads] == [0, 0, 3, 3] for heads in drawn)
    assert all(heads[i][1] in (1, 3) and heads[i + 1][1] in (0, 2) for heads in drawn for i in (0, 2))
    assert len({tuple(heads) for heads in drawn}) > 1 and shared_heads.drawn(layers, 3) == drawn[3]


def cell(seed: int, shared: float) -> dict:
    heads = [
        {
            "layer": 0,
            "head": 0,
            "kind": "shared",
            "load": 1.0,
            "removed": [shared, 3 * shared],
            "frozen": [0.0, shared],
        },
        {"layer": 0, "head": 1, "kind": "routed", "load": 0.5, "removed": [0.01, 0.03], "frozen": [0.01, 0.03]},
        {"layer": 0, "head": 2, "kind": "routed", "load": 0.0, "removed": [0.0, 0.0], "frozen": [0.0, 0.0]},
    ]
    about = {"cpu": "a CPU", "threads": 1, "torch": "2", "groups": ["a", "b"], "loss": 1.0, "units": 8}
    return about | {"seed": seed, "heads": heads}


def test_the_figures_are_means_and_parts_of_sums() -> None:
    shared, routed, _ = cell(0, 0.1)["heads"]
    assert shared_heads.summary([shared]) == pytest.approx([200, 200, 1 - 0.05 / 0.2, 2**0.5 / 2])
    assert shared_heads.summary([routed]) == pytest.approx([20, 40, 0, 2**0.5 / 2])
    both = shared_heads.summary([shared, routed])
    assert both == pytest.approx([110, 120, 1 - 0.07 / 0.22, 2**0.5 / 2])


def test_errors_are_those_of_drawing_heads_again() -> None:
    heads = [cell(0, 0.1)["heads"][0], cell(0, 0.3)["heads"][0]] * 8
    rise, use, constant, uneven = shared_heads.errors(heads)
    assert rise == use == pytest.approx(200 / 16**0.5, rel=0.15)  # of 200 and 600
    assert constant == pytest.approx(0, abs=1e-9) and uneven == pytest.approx(0, abs=1e-9)


def test_the_page_has_the_used_heads_of_all_seeds_and_the_command() -> None:
    made = shared_heads.DEFAULTS | {"models": ["images"], "seeds": [0, 2], "name": "mine"}
    text = "\n".join(shared_heads.page({"images": [cell(0, 0.1), cell(2, 0.1)]}, made))
    assert "python experiments/shared_heads.py --models images --seeds 0 2 --name mine" in text
    assert "| shared, 2 | 200.00 ± 0.00 | 200.00 ± 0.00 | 0.75 ± 0.00 | 0.71 ± 0.00 |" in text
    assert "| routed, 2 | 20.00 ± 0.00 | 40.00 ± 0.00 | 0.00 ± 0.00 | 0.71 ± 0.00 |" in text
    assert "| shared − routed | +180.00 ± 0.00 | +160.00 ± 0.00 | +0.75 ± 0.00 | +0.00 ± 0.00 |" in text
    assert "8 inputs; seeds 0, 2." in text


def test_a_head_that_two_seeds_draw_from_one_model_counts_once() -> None:
    made = shared_heads.DEFAULTS | {"seeds": [0, 2], "name": "mine"}
    cells = [cell(0, 0.1), cell(2, 0.1)]
    assert len(shared_heads.different("images", cells)) == 2 * len(shared_heads.different("texts", cells)) == 6
    text = "\n".join(shared_heads.page({"texts": cells}, made))
    assert "| shared, 1 |" in text and "| routed, 1 |" in text
    cells[1]["heads"][0]["head"] = 3
    assert "| shared, 2 |" in "\n".join(shared_heads.page({"texts": cells}, made))


def test_only_finished_seeds_are_on_the_page(tmp_path: Path) -> None:
    options = argparse.Namespace(**shared_heads.DEFAULTS, work=tmp_path, out=tmp_path / "out", name="mine")
    with pytest.raises(SystemExit, match="no seed is finished"):
        shared_heads.write(options)
    shared_heads.cell_file(options, "images", 1).write_text(json.dumps(cell(1, 0.1)))
    shared_heads.write(options)
    text = (tmp_path / "out" / "mine.md").read_text()
    assert "`python experiments/shared_heads.py --name mine` (not finished: images 0, texts 0, texts 1)" in text
    assert "8 inputs; seed 1." in text and shared_heads.LABELS["texts"] not in text
