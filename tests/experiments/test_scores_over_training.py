"""Promise: the curve of scores has every checkpoint of every run, in the order of the steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from scores_over_training import checkpoints, label, rows, write


@pytest.fixture
def runs(tmp_path):
    for run, steps in (("moh", (200, 1000)), ("dense", (200,))):
        for step in steps:
            (tmp_path / run / f"checkpoint-{step}").mkdir(parents=True)
            (tmp_path / run / f"checkpoint-{step}" / "config.json").write_text("{}")
    (tmp_path / "moh" / "checkpoint-50").mkdir()  # incomplete: no model
    (tmp_path / "moh" / "model").mkdir()
    return tmp_path


def test_checkpoints_are_found_in_the_order_of_their_steps(runs) -> None:
    found = checkpoints([runs / "moh", runs / "dense"])
    assert {run: [step for step, _ in steps] for run, steps in found.items()} == {"moh": [200, 1000], "dense": [200]}
    assert found["moh"][1][1] == runs / "moh" / "checkpoint-1000"


def test_runs_without_checkpoints_or_with_one_name_are_refused(runs, tmp_path) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(SystemExit, match="has no directory checkpoint-N with a model: give the output_dir"):
        checkpoints([runs / "empty"])
    with pytest.raises(SystemExit, match="runs must have different names, got 'moh' twice"):
        checkpoints([runs / "moh", runs / "moh"])


def score(task: str, metric: str, value: float, stderr: float) -> SimpleNamespace:
    return SimpleNamespace(label=task, metric=metric, value=value, stderr=stderr)


def test_scores_are_percentages_only_where_they_are_shares_and_may_lack_a_standard_error(runs) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    found = checkpoints([runs / "dense"])
    scores = (score("BLiMP", "acc", 0.5, math.nan), score("WikiText", "word_perplexity", 31.25, math.nan))
    models = [SimpleNamespace(label=label("dense", 200), scores=scores)]
    average = SimpleNamespace(value=0.5, stderr=0.02)
    write(runs / "out", rows(found, SimpleNamespace(models=models, average=lambda place: average)))
    table = (runs / "out" / "scores.md").read_text().splitlines()
    assert table[0] == "| run | step | BLiMP (%) | WikiText | average (%) |"
    assert table[2] == "| dense | 200 | 50.0 | 31.250 | 50.0 ± 2.0 |"
    assert "dense,200,average,50.0,2.0,%" in (runs / "out" / "scores.csv").read_text()


def test_the_table_and_the_curve_have_every_step(runs) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    found = checkpoints([runs / "moh", runs / "dense"])
    models = [
        SimpleNamespace(label=label(run, step), scores=(score("PIQA", "acc", step / 1000, 0.01),))
        for run, steps in reversed(found.items())
        for step, _ in steps
    ]
    result = SimpleNamespace(models=models, average=lambda place: None)
    write(runs / "out", rows(found, result))
    table = (runs / "out" / "scores.md").read_text()
    assert (
        "| run | step | PIQA (%) |\n| --- | --- | --- |\n"
        "| moh | 200 | 20.0 ± 1.0 |\n| moh | 1,000 | 100.0 ± 1.0 |\n| dense | 200 | 20.0 ± 1.0 |" in table
    )
    assert (runs / "out" / "scores.csv").read_text().count("\n") == 4
    assert (runs / "out" / "scores.png").stat().st_size > 1000
