"""Runs that read any mix of sources, dense or converted, stored or streamed; a source that changes midway is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moh.training import load_recipe, train

WORDS = "head token gate router layer value key query".split()


@pytest.fixture
def options(base_dir: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A run of four steps on a text file and JSONL; every fourth sequence comes from the JSONL."""
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"words": " ".join(WORDS)}) + "\n" for _ in range(20)))
    return [
        f"--model.path={base_dir}",
        f"--data.sources=[{{path: {text_file}, weight: 3}}, {{path: {tmp_path}/b.jsonl, text_field: words}}]",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.seq_len=16",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.max_steps=4",
        "--training.save_steps=2",
        "--training.learning_rate=0.01",
        "--training.per_device_train_batch_size=2",
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true, 'report_to': []}",
    ]


CONVERSION = ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--conversion.calibration_tokens=256"]


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["stored", "streamed"])
@pytest.mark.parametrize("conversion", [[], CONVERSION], ids=["dense", "converted"])
def test_a_pretrained_model_is_trained_on_sources(options: list[str], streaming: str, conversion: list[str]) -> None:
    options += [f"--data.streaming={streaming}", *conversion]
    options += ["--training.max_steps=30", "--training.per_device_train_batch_size=8"]
    losses = [loss for _, loss in train(load_recipe(None, options)).losses]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.05


def test_tokens_per_batch_gives_the_losses_of_the_accumulation_that_it_means(
    options: list[str], tmp_path: Path
) -> None:
    a = train(load_recipe(None, [*options, "--training.gradient_accumulation_steps=3"]))
    other = ["--training.tokens_per_batch=96", f"--training.output_dir={tmp_path / 'other'}"]
    assert train(load_recipe(None, [*options, *other])).losses == a.losses


def _go_on_from_step_2(options: list[str], tmp_path: Path):
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    return train(load_recipe(None, options))


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["stored", "streamed"])
def test_a_source_that_changed_during_a_run_is_refused(options: list[str], tmp_path: Path, streaming: str) -> None:
    options += [f"--data.streaming={streaming}"]
    whole = train(load_recipe(None, options))
    assert _go_on_from_step_2(options, tmp_path).losses == whole.losses
    (tmp_path / "b.jsonl").write_text(json.dumps({"words": " ".join(WORDS) * 5}))
    with pytest.raises(ValueError, match=r"data\.sources: 1: .*b\.jsonl or the tokenizer has changed since the run in"):
        _go_on_from_step_2(options, tmp_path)


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["stored", "streamed"])
def test_what_a_loader_process_has_read_ahead_is_not_lost(options: list[str], tmp_path: Path, streaming: str) -> None:
    options += [f"--data.streaming={streaming}", "--data.stream_buffer=3"]
    whole = train(load_recipe(None, [*options, f"--training.output_dir={tmp_path / 'whole'}"]))
    ahead = "{'disable_tqdm': true, 'report_to': [], 'dataloader_num_workers': 1, 'dataloader_prefetch_factor': 4}"
    options += [f"--training.extra={ahead}"]
    assert train(load_recipe(None, options)).losses == whole.losses
    assert _go_on_from_step_2(options, tmp_path).losses == whole.losses


def test_a_stored_source_may_be_touched_if_its_text_stays(options: list[str], tmp_path: Path) -> None:
    whole = train(load_recipe(None, options))
    (tmp_path / "b.jsonl").touch()
    assert _go_on_from_step_2(options, tmp_path).losses == whole.losses


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("[{path: /nowhere.jsonl}]", FileNotFoundError, r"data\.sources\[0\]\.path: no such file .*/nowhere\.jsonl"),
        ("[{path: TMP/b.jsonl}]", ValueError, r"no text_field 'text'; there is 'words'"),
        ("[{path: TMP/short.txt}]", ValueError, r"short\.txt holds 3 tokens, too few for one sequence .*seq_len = 16"),
    ],
    ids=["missing", "field", "too_short"],
)
def test_a_source_that_cannot_be_read_is_said_before_training(
    options: list[str], tmp_path: Path, override: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "short.txt").write_text("the head")
    with pytest.raises(error, match=message):
        train(load_recipe(None, [*options, "--data.sources=" + override.replace("TMP", str(tmp_path))]))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_text_longer_than_a_pretrained_model_is_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"seq_len must be at most the model's max_position_embeddings = 64, got 65"):
        train(load_recipe(None, [*options, "--data.seq_len=65"]))
