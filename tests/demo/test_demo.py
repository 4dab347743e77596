"""Promise: one call converts, tunes, measures and reports; every number in the report follows from its files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moh import convert, record_routing
from moh.demo import DemoSettings, pipeline, run_demo
from moh.demo.report import _TITLE, DemoReport, ModelRow, check_report_files, compared
from moh.evaluation import PerplexityResult, perplexity
from moh.models.transformers import MoHLlamaForCausalLM
from moh.training import corpus_from_files, pack_tokens

ROWS = {
    "dense original": None,
    "MoH, the paper's router, untuned": "dense original",
    "MoH, contribution router alone, untuned": "dense original",
    "MoH, ours, untuned": "dense original",
    "dense control, tuned": "dense original",
    "MoH, the paper's router, tuned": "dense control, tuned",
    "MoH, ours, tuned": "dense control, tuned",
}
FILES = {
    *("report.json", "report.md", "model", "head_load.csv"),
    *(f"{name}.{suffix}" for name in ("head_load", "losses") for suffix in ("png", "svg")),
}


@pytest.fixture(scope="module")
def settings(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    return DemoSettings(
        output_dir=str(tmp_path_factory.mktemp("demo") / "new" / "out"),
        base=str(base_dir),
        files=(str(text_file),),
        steps=4,
        seq_len=32,
        calibration_tokens=512,
        heldout_tokens=160,
        full=True,
    )


@pytest.fixture(scope="module")
def report(settings: DemoSettings) -> DemoReport:
    return run_demo(settings)


@pytest.fixture(scope="module")
def heldout(settings: DemoSettings) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    blocks = pack_tokens(corpus_from_files(settings.files).heldout, tokenizer, seq_len=32)
    assert len(blocks) > 5
    return blocks[torch.linspace(0, len(blocks) - 1, 5).long()]


@pytest.fixture(scope="module")
def rows(report: DemoReport) -> dict[str, ModelRow]:
    return {row.name: row for row in report.rows}


def test_the_output_directory_holds_report_pictures_and_model_and_nothing_else(settings, report) -> None:
    assert {path.name for path in Path(settings.output_dir).iterdir()} == FILES


def test_the_models_card_has_the_perplexities_next_to_their_controls(settings, report, rows) -> None:
    card = (Path(settings.output_dir) / "model" / "README.md").read_text(encoding="utf-8")
    for what, ours, control in (
        ("converted; the control is the original", "MoH, ours, untuned", "dense original"),
        ("tuned 4 steps", "MoH, ours, tuned", "dense control, tuned"),
    ):
        figures = f"{rows[ours].perplexity:.2f} | {rows[control].perplexity:.2f}"
        assert f"| held-out perplexity, {what} | {figures} |" in card


def test_the_report_file_is_the_returned_report(settings, report) -> None:
    read = json.loads((Path(settings.output_dir) / "report.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(asdict(report)))
    assert read["steps"] == 4 and read["tuning_tokens"] == 4 * 2 * 32
    assert read["calibration_tokens"] == 512 and read["heldout_tokens"] == 5 * 31
    assert {name: len(curve) for name, curve in read["losses"].items()} == {
        "dense control": 4,
        "MoH, the paper's router": 4,
        "MoH, ours": 4,
    }
    assert set(read["speed"]["models"]) == {"dense", "MoH"}
    assert read["precision"] in ("fp32", "bf16")


def test_each_model_is_compared_with_the_dense_one_at_its_stage(rows) -> None:
    assert {name: row.compared_with for name, row in rows.items()} == ROWS
    for row in rows.values():
        if "ours" not in row.name:  # ours uses as many heads as the held-out text needs
            assert row.share == (1.0 if "dense" in row.name else pytest.approx(3 / 4))
        if row.compared_with:
            ratio = row.perplexity / rows[row.compared_with].perplexity
            assert math.exp(row.loss_rise) == pytest.approx(ratio, rel=1e-6)
            assert row.above == pytest.approx(100 * (ratio - 1), rel=1e-4, abs=1e-6)
            assert row.rise_stderr > 0


def test_an_untuned_row_can_be_computed_again(settings, rows, heldout) -> None:
    dense = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.float32)
    paper = convert(dense, shared_heads=2, active_heads=1, router="query_norm")
    results = perplexity(dense, heldout), perplexity(paper, heldout)
    differences = torch.tensor(results[1].block_losses) - torch.tensor(results[0].block_losses)
    row = rows["MoH, the paper's router, untuned"]
    assert rows["dense original"].perplexity == pytest.approx(results[0].perplexity)
    assert row.perplexity == pytest.approx(results[1].perplexity)
    assert row.loss_rise == pytest.approx(float(differences.mean()), rel=1e-3)
    assert row.rise_stderr == pytest.approx(float(differences.std() / 5**0.5), rel=1e-3)


def test_the_saved_model_is_the_one_that_was_measured(settings, report, rows, heldout) -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(settings.output_dir) / "model")
    assert isinstance(model, MoHLlamaForCausalLM)
    assert perplexity(model, heldout).perplexity == pytest.approx(rows["MoH, ours, tuned"].perplexity, rel=1e-6)
    with record_routing(model) as routing:
        perplexity(model, heldout)
    assert rows["MoH, ours, tuned"].share == pytest.approx(routing.share(), rel=1e-6)
    assert rows["MoH, ours, tuned"].share != pytest.approx(model.config.share, rel=1e-6)
    # an average over the calibration's tokens, measured here on held-out ones
    assert report.layer_shares == pytest.approx([c.share for c in model.config.layer_configs()], abs=0.05)
    tokenizer = AutoTokenizer.from_pretrained(Path(settings.output_dir) / "model")
    assert tokenizer("the head").input_ids == AutoTokenizer.from_pretrained(settings.base)("the head").input_ids


def test_the_page_shows_every_row_and_the_pictures(settings, report) -> None:
    page = (Path(settings.output_dir) / "report.md").read_text(encoding="utf-8")
    for row in report.rows:
        assert f"| {row.name} | {100 * row.share:.0f} % | {row.perplexity:.2f} |" in page
    for picture in ("losses.png", "head_load.png"):
        assert f"({picture})" in page and (Path(settings.output_dir) / picture).is_file()


def test_a_second_run_in_the_same_directory_gives_the_same_numbers(settings, report, rows) -> None:
    again = run_demo(settings)
    assert {path.name for path in Path(settings.output_dir).iterdir()} == FILES
    assert {row.name: row.perplexity for row in again.rows} == {n: pytest.approx(r.perplexity) for n, r in rows.items()}


def test_a_demo_with_another_router_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pipeline._Demo(DemoSettings(str(tmp_path)))
    before = demo._work_dir()
    monkeypatch.setattr(pipeline, "ROUTER", "linear")
    assert demo._work_dir() != before


def test_the_short_demo_leaves_the_papers_way_untuned(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = dict(base=str(base_dir), files=(str(text_file),), seq_len=32, steps=1, heldout_tokens=64)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "notes.txt").write_text("keep me")
    report = run_demo(
        DemoSettings(str(tmp_path), **options, calibration_tokens=16, shared_heads=1, active_heads=1,
                     distillation_weight=0.5)
    )  # fmt: skip
    assert [row.name for row in report.rows] == [
        name for name in ROWS if "alone" not in name and name != "MoH, the paper's router, tuned"
    ]
    assert report.calibration_tokens == 32  # at least one block
    assert [path.name for path in (tmp_path / "training").iterdir()] == ["notes.txt"]  # the demo's own work is gone
    shares = {row.name: row.share for row in report.rows if row.name.startswith("MoH")}
    assert shares.pop("MoH, the paper's router, untuned") == pytest.approx(2 / 4)
    assert shares == {
        name: pytest.approx(2 / 4, abs=0.12) for name in shares
    }  # measured, after 32 tokens of calibration


def test_the_error_of_a_comparison_is_that_of_the_paired_differences() -> None:
    base = PerplexityResult(math.exp(2), 2.0, 10, 0.0, (1.0, 2.0, 3.0))
    other = PerplexityResult(math.exp(2.5), 2.5, 10, 0.0, (1.4, 2.5, 3.6))
    row = compared("other", 0.5, other, ModelRow("base", 1.0, base.perplexity), base)
    assert (row.name, row.share, row.compared_with) == ("other", 0.5, "base")
    assert row.loss_rise == pytest.approx(0.5)
    assert row.rise_stderr == pytest.approx(0.1 / 3**0.5)
    assert row.above == pytest.approx(100 * (math.exp(0.5) - 1))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("minutes", 0.0, "minutes must be above 0, got 0.0"),
        ("learning_rate", -1.0, "learning_rate must be above 0, got -1.0"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("calibration_tokens", 0, "calibration_tokens must be at least 1, got 0"),
        ("heldout_tokens", 0, "heldout_tokens must be at least 1, got 0"),
        ("seq_len", 1, "seq_len must be at least 2, got 1"),
        ("distillation_weight", 1.5, r"distillation_weight must be .* 1(\.0)?, got 1\.5"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings(**{setting: value})


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match=f"output_dir {target} can't be written: Not a directory"):
        run_demo(DemoSettings(output_dir=str(target), base="/nowhere/at/all"))


@pytest.mark.parametrize("earlier", ["nothing", "an interrupted demo", "a demo"])
@pytest.mark.parametrize("name", ["report.md", "report.json", "losses.png"])
def test_a_file_that_no_demo_wrote_is_kept(tmp_path: Path, earlier: str, name: str) -> None:
    if earlier == "an interrupted demo":
        (tmp_path / "training" / "0123456789ab").mkdir(parents=True)
    if earlier == "a demo":
        (tmp_path / "report.json").write_text('{"base_model": "a", "layer_shares": [], "rows": []}')
        (tmp_path / "report.md").write_text(f"{_TITLE}\n")
        (tmp_path / "losses.png").write_text("a picture")
        check_report_files(tmp_path)
    if name == "losses.png" and earlier != "nothing":
        return  # pictures are an earlier demo's by the files next to them
    (tmp_path / name).write_text("{}" if name == "report.json" else "# My report")
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} holds a {name} that no demo wrote.*choose another"):
        run_demo(DemoSettings(output_dir=str(tmp_path), base="/nowhere/at/all"))


def test_heads_that_do_not_add_up_are_refused_before_tuning(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = dict(base=str(base_dir), files=(str(text_file),), seq_len=32, shared_heads=3, active_heads=2)
    with pytest.raises(ValueError, match=r"active_heads must be between 0 and .* = 1, got 2"):
        run_demo(DemoSettings(str(tmp_path / "out"), **options))
    assert not list((tmp_path / "out").iterdir())
