"""The trade-off curve: what it measures at each budget, and the command that draws it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moh
from moh.cli import main
from moh.evaluation import perplexity
from moh.evaluation.curve import budgets, text_curve
from moh.models.budget import moh_routers


@pytest.fixture
def model() -> Any:
    from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, router="linear", shared_heads=1, active_heads=1)
    return MoHLlamaForCausalLM(MoHLlamaConfig(**sizes, **heads)).eval()


BLOCKS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(3))


def test_every_point_is_the_model_at_that_budget(model: Any) -> None:
    curve = text_curve(model, BLOCKS, repeats=0)
    assert [p.share for p in curve.points] == [0.25, 0.5, 0.75, 1.0]
    assert [p.active_heads for p in curve.points] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for point in curve.points:
        with moh.active_heads(model, list(point.active_heads)):
            assert point.perplexity == perplexity(model, BLOCKS).perplexity
    assert len({p.perplexity for p in curve.points}) == 4
    assert [r.config.active_heads for r in moh_routers(model)] == [1, 1], "the model is left as it was"


def test_speeds_are_measured_at_the_budget_of_their_point(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moh.evaluation import speed

    def timed(model: Any, prompt: Any, decode_tokens: int) -> tuple[float, float]:
        return 1.0 + model.config.share, 1.0

    monkeypatch.setattr(speed, "_time_once", timed)
    curve = text_curve(model, BLOCKS, shares=[1.0, 0.5], prompt_tokens=8, decode_tokens=2, repeats=2)
    assert [p.prefill.median for p in curve.points if p.prefill] == [8 / 1.5, 8 / 2.0]
    assert [p.decode.median for p in curve.points if p.decode] == [2.0, 2.0]
    assert model.config.active_heads == 1


def test_budgets_go_from_the_fewest_heads_to_all_in_at_most_nine_steps(model: Any) -> None:
    assert budgets(model) == [0.25, 0.5, 0.75, 1.0]
    assert budgets(model, points=2) == [0.25, 1.0]
    assert budgets(model, points=1) == [1.0]
    wide = torch.nn.Sequential(moh.MoHAttention(64, 32, shared_heads=8, active_heads=8, router="linear"))
    assert budgets(wide) == [0.25 + 0.75 * i / 8 for i in range(9)]
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        budgets(model, points=0)


@pytest.mark.parametrize(("shares", "message"), [([], "at least one share"), ([0.5, 1.2], "at most 1, got 1.2")])
def test_shares_out_of_range_are_refused_before_anything_is_measured(
    model: Any, shares: list[float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moh.evaluation.curve.perplexity", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        text_curve(model, BLOCKS, shares=shares)


def test_one_command_writes_picture_table_and_json(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    target, out = tmp_path / "model", tmp_path / "curve"
    options = ["--shared-heads", "1", "--active-heads", "1", "--files", str(text_file), "--calibration-tokens", "512"]
    assert main(["convert", str(base_dir), str(target), *options]) == 0
    sizes = ["--seq-len", "16", "--max-tokens", "64", "--prompt-tokens", "8", "--decode-tokens", "2", "--repeats", "2"]
    assert main(["curve", str(target), "--out", str(out), "--files", str(text_file), *sizes]) == 0
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "curve.svg").read_text(encoding="utf-8")
    rows = list(csv.DictReader((out / "curve.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(row["share"]) for row in rows] == [0.25, 0.5, 0.75, 1.0]
    data = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    assert [p["perplexity"] for p in data["points"]] == [float(row["perplexity"]) for row in rows]
    assert all(float(row["decode_per_second"]) > 0 for row in rows)


def test_a_dense_model_has_no_curve(base_dir: Path, text_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["curve", str(base_dir), "--out", str(tmp_path), "--files", str(text_file), "--seq-len", "16"]) == 2
    assert "moh.convert makes a MoH model of it" in capsys.readouterr().err
