"""Promise: `moh convert --report` writes the model first, then a page on what converting it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertModel

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

from moh._files import check_replaceable
from moh.evaluation import conversion_measure

FILES = [f"conversion_report{end}" for end in (".html", ".json", ".md", "_curve.png", "_heads.png")]
OPTIONS = ("--calibration-tokens", 512, "--report", "--report-lengths", 8)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_measure, "SHARES", (0.5,))
    monkeypatch.setattr("moh.conversion.transformers.SEQ_LEN", 32)


def test_the_report_is_next_to_the_model(moh, base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    lengths = ("--calibration-length", 32, 64)
    result = moh("convert", base_dir, output, "--share", 0.75, "--files", text_file, *lengths, *OPTIONS, "--json")
    assert result.code == 0, result.err
    assert sorted(file.name for file in output.glob("conversion_report*")) == FILES
    check_replaceable(output, name="output")  # by another conversion, the report included
    found = json.loads((output / "conversion_report.json").read_text())
    assert json.loads(result.out[-1])["recommendation"] == found["recommendation"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.share == 0.75 == found["cells"][0]["share"] and "8" in found["counted"]
    assert list(found["dense"]) == [text_file.name]
    card = (output / "README.md").read_text()
    assert f"perplexity on {text_file.name}" in card and "512 tokens of words.txt, in blocks of 32 and 64" in card


@pytest.mark.parametrize(
    ("options", "method"),
    [(["--router", "fixed"], "fixed heads"), (["--layers", "drop"], "layers dropped, linear map")],
    ids=["fixed", "drop"],
)
def test_the_model_is_of_the_kind_requested_and_an_interrupted_report_is_kept(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options, method
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion_measure, "measure_speed", interrupt)
    words = ["--active-heads", 2, "--files", text_file, *OPTIONS, *options]
    assert moh("convert", base_dir, tmp_path / "model", *words).code == 130
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = json.loads((tmp_path / "model" / "conversion_report.json").read_text())
    assert found["cells"][0]["method"] == method and model.config.share == 0.5 == found["cells"][0]["share"]
    assert "Recommendation" in (tmp_path / "model" / "conversion_report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shared-heads", 1, "--active-heads", 1], "leave out --shared-heads 1, or --report"),
        (["--shares", 0.5], "leave out --shares"),
        (["--router", "two_stage"], "leave out --router two_stage"),
        (["--router", "fixed", "--layers", "keep"], "leave out --router fixed"),
        (["--router", "linear", "--layers", "drop"], "leave out --router linear"),
        (["--router", "threshold", "--layers", "drop"], "leave out --router threshold"),
        (["--allocation", "even"], "leave out --allocation even"),
        (["--no-refit-output"], "leave out --no-refit-output, or"),
        (["--report-lengths", 65], "lengths must be between 1 and 64 for this model, got 65"),
        (["--active-heads", 9], "active_heads must be between 1 and 3, got 9"),
        (["--plan"], "--plan and --report must not both be given"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_report_can_not_have_is_refused(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, options, words
) -> None:
    result = moh("convert", base_dir, tmp_path / "model", "--files", text_file, "--report", *options)
    assert result.code == 2 and words in result.err[-1], result.err
    assert not (tmp_path / "model").exists()


def test_lengths_need_a_report(moh, base_dir: Path, tmp_path: Path) -> None:
    result = moh("convert", base_dir, tmp_path / "model", "--report-lengths", 8)
    assert result.code == 2 and "--report-lengths needs --report" in result.err[-1]


def test_a_model_without_a_next_token_has_no_report(moh, base_dir: Path, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(tmp_path / "bert")
    for file in base_dir.glob("token*"):
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    result = moh("convert", tmp_path / "bert", tmp_path / "model", "--report")
    assert result.code == 2 and "is a BertModel: leave out --report" in result.err[-1]
