"""A killed training run resumes exactly from its last complete checkpoint."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from moh.training import load_recipe, train
from moh.training.checkpoints import checkpoint_problem, last_complete_checkpoint
from moh.training.session import open_session


@pytest.fixture(scope="module")
def finished(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of four steps with a checkpoint every two."""
    out = tmp_path_factory.mktemp("finished")
    options = [f"--model.path={base_dir}", f"--data.files=['{text_file}']", "--data.seq_len=16"]
    options += [f"--training.output_dir={out}", "--training.max_steps=4", "--training.save_steps=2"]
    train(load_recipe(None, [*options, "--training.precision=fp32", "--training.extra={'disable_tqdm': true}"]))
    return out


def test_a_killed_run_resumes_and_ends_with_the_losses_of_an_uninterrupted_one(
    team, options: list[str], tmp_path: Path
) -> None:
    options += ["--training.save_steps=2", "--training.gradient_accumulation_steps=2", "--training.max_steps=6"]
    killed = [*options, f"--training.output_dir={tmp_path / 'killed'}"]
    team("losses", 1, runs=[killed], kill_at=5, killed=True)
    assert last_complete_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    assert not (tmp_path / "killed" / "model").exists()

    resumed, whole = train(load_recipe(None, killed)), train(load_recipe(None, options))
    assert resumed.resumed_from.name == "checkpoint-4"
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 5, 6]
    assert len({loss for _, loss in whole.losses}) == 6
    assert resumed.losses == whole.losses
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    result = train(load_recipe(finished / "recipe.yaml"))
    assert [step for step, _ in result.losses] == [1, 2, 3, 4]
    assert not list(finished.glob("checkpoint-5"))


def test_the_last_step_is_logged_whatever_the_steps_between(options: list[str]) -> None:
    options += ["--conversion={'shared_heads': 1, 'active_heads': 2, 'calibration_tokens': 32}"]
    options += ["--training.logging_steps=3", "--training.save_steps=3"]
    short = train(load_recipe(None, [*options, "--training.max_steps=2"]))
    again = train(load_recipe(None, [*options, "--training.max_steps=2"]))
    assert [step for step, _ in short.losses] == [2] and again.losses == short.losses
    longer = train(load_recipe(None, [*options, "--training.max_steps=7"]))
    assert [step for step, _ in longer.losses] == [2, 3, 6, 7] and longer.losses[:1] == short.losses
    assert all("active_share" in entry for entry in longer.log_history if "loss" in entry)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda c: (c / "trainer_state.json").unlink(), "no trainer_state.json", id="state_not_yet_written"
        ),
        pytest.param(lambda c: _truncate(c / "trainer_state.json"), "can't be read", id="state_half_written"),
        pytest.param(lambda c: (c / "model.safetensors").unlink(), "no weights", id="weights_deleted"),
        pytest.param(
            lambda c: _truncate(c / "model.safetensors"), "model.safetensors is cut off", id="weights_cut_off"
        ),
        pytest.param(lambda c: _truncate(c / "optimizer.pt"), "optimizer.pt is cut off", id="optimizer_cut_off"),
        pytest.param(lambda c: (c / "rng_state.pth").unlink(), "no rng_state", id="random_state_missing"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_with_a_warning(finished: Path, tmp_path: Path, damage, reason) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert last_complete_checkpoint(out) == out / "checkpoint-4"
    damage(out / "checkpoint-4")
    with pytest.warns(UserWarning, match=f"checkpoint-4.*{reason}"):
        assert last_complete_checkpoint(out) == out / "checkpoint-2"
    assert checkpoint_problem(out / "checkpoint-2") is None


def test_a_checkpoint_of_deepspeed_is_complete_with_the_last_file_it_writes(finished: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "global_step4").mkdir()
    assert checkpoint_problem(checkpoint) == "it has no latest"
    (checkpoint / "latest").write_text("global_step4")
    assert checkpoint_problem(checkpoint) is None


def test_a_checkpoint_of_deepspeed_is_gone_on_from_with_deepspeed_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    (out / "checkpoint-4" / "global_step4").mkdir()
    (out / "checkpoint-4" / "latest").write_text("global_step4")
    here = f"--training.output_dir={out}"
    with pytest.raises(ValueError, match=r"checkpoint-4 were written by DeepSpeed: resume with it, or choose another"):
        train(load_recipe(finished / "recipe.yaml", [here, "--training.max_steps=6"]))
    result = train(load_recipe(finished / "recipe.yaml", [here]))  # no optimiser needed
    assert len(result.losses) == 4


def test_checkpoints_are_ordered_by_step_not_by_name(finished: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(finished / "checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_of_another_recipe_are_not_continued(finished: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml", ["--data.seq_len=8"])
    with pytest.raises(ValueError, match=r"holds checkpoints of another recipe \(data was .*seq_len=16"):
        train(recipe)


def test_losses_are_still_the_checkpoint_state(finished: Path) -> None:
    state = json.loads((finished / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("precision", ["fp32", "auto", "bf16"])
def test_a_run_that_resumes_in_another_precision_warns(finished: Path, tmp_path: Path, precision: str) -> None:
    shutil.copytree(finished, tmp_path / "out")
    options = [f"--training.output_dir={tmp_path / 'out'}", f"--training.precision={precision}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = open_session(load_recipe(finished / "recipe.yaml", options))
    told = [str(warning.message) for warning in caught if "began in" in str(warning.message)]
    assert session.precision == ("bf16" if precision == "bf16" else "fp32")
    assert len(told) == (precision == "bf16")
    assert not told or "out began in fp32 and resumes in bf16: set training.precision to fp32" in told[0]


def test_another_number_of_samples_per_step_is_refused(options: list[str], tmp_path: Path) -> None:
    options += ["--training.save_steps=2", "--training.max_steps=4"]
    train(load_recipe(None, options))
    with pytest.raises(ValueError, match=r"began with 2 samples per optimiser step.*resuming needs as many, got 3"):
        train(load_recipe(None, [*options, "--training.max_steps=6", "--training.per_device_train_batch_size=3"]))
    same = ["--training.per_device_train_batch_size=1", "--training.gradient_accumulation_steps=2"]
    result = train(load_recipe(None, [*options, "--training.max_steps=6", *same]))
    assert result.resumed_from == tmp_path / "out" / "checkpoint-4"
