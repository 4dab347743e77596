"""A killed run resumes exactly: weights, moving average, augmentation, learning rate, top-1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moh import _files
from moh.models.timm.loading import load_image_classifier
from moh.training import load_recipe, train
from moh.training.checkpoints import last_complete_checkpoint

EVERYTHING = [  # more than an epoch of seven batches, so that order and augmentation change during the run
    "--training.max_steps=10",
    "--training.save_steps=4",
    "--training.eval_steps=2",
    "--training.ema_decay=0.7",
    "--training.keep_best=true",
    "--model.drop_path=0.3",
    "--augmentation.mixup=0.8",
    "--augmentation.cutmix=1",
    "--augmentation.crop_padding=2",
    "--augmentation.random_erasing=0.5",
    "--augmentation.label_smoothing=0.1",
]


@pytest.mark.parametrize("extra", [[], ["--augmentation.repeats=3", "--training.rate_changes=epoch"]], ids=str)
def test_a_killed_run_resumes_and_ends_as_an_uninterrupted_one(team, options: list[str], tmp_path: Path, extra) -> None:
    options += [*EVERYTHING, *extra]
    killed = [*options, f"--training.output_dir={tmp_path / 'killed'}"]
    team("losses", 1, runs=[killed], kill_at=9, killed=True)
    assert last_complete_checkpoint(tmp_path / "killed").name == "checkpoint-8"

    resumed, whole = train(load_recipe(None, killed)), train(load_recipe(None, options))
    assert resumed.resumed_from.name == "checkpoint-8"
    assert len({loss for _, loss in whole.losses}) == 10
    assert resumed.losses == whole.losses
    assert resumed.top1 == whole.top1 and [step for step, _ in whole.top1] == [2, 4, 6, 8, 10]
    pairs = [(resumed.model, whole.model)]
    pairs += [tuple(load_image_classifier(tmp_path / of / "best") for of in ("killed", "out"))]
    for ours, theirs in pairs:
        for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_a_run_goes_on_with_loading_processes_as_without(options: list[str], tmp_path: Path) -> None:
    options += [*EVERYTHING, "--augmentation.crop_padding=0", "--augmentation.auto_augment=rand-m9-mstd0.5-inc1"]
    options += ["--training.save_total_limit=3"]
    whole = train(load_recipe(None, options))
    for step in (8, 10):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    resumed = train(load_recipe(None, [*options, "--training.workers=1"]))
    assert resumed.resumed_from.name == "checkpoint-4"
    assert resumed.losses == whole.losses and len({loss for _, loss in whole.losses}) == 10


def test_a_finished_run_is_not_trained_again_but_has_its_top1(options: list[str]) -> None:
    whole = train(load_recipe(None, [*options, "--training.ema_decay=0.5"]))
    again = train(load_recipe(None, [*options, "--training.ema_decay=0.5"]))
    assert again.resumed_from.name == "checkpoint-6"
    assert again.losses == whole.losses and again.top1[-1] == whole.top1[-1]
    for (name, a), (_, b) in zip(again.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("max_steps", [6, 5])  # of 5 steps there is no score yet: the model is evaluated again
@pytest.mark.parametrize("shares", [[90.0, 60.0], [60.0, 90.0]], ids=["best-before-the-end", "best-at-the-end"])
def test_a_finished_run_that_is_started_again_keeps_its_best_model(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float], max_steps: int
) -> None:
    options += ["--training.keep_best=true", "--training.eval_steps=4"]
    scores = iter([*shares, shares[-1]])
    metrics = "moh.training.images.trainer._metrics"
    monkeypatch.setattr(metrics, lambda prediction: {"top1": next(scores), "top5": 100.0, "loss": 1.0})
    train(load_recipe(None, options))
    file = tmp_path / "out" / "best" / "model.safetensors"
    before = file.read_bytes()
    again = train(load_recipe(None, [*options, f"--training.max_steps={max_steps}"]))
    assert again.top1[:2] == [(4, shares[0]), (6, shares[1])]
    assert (next(scores, None) is None) is (max_steps == 5)
    assert file.read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again_over_its_best_model(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options += ["--training.keep_best=true", "--training.eval_steps=2"]
    train(load_recipe(None, options))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    monkeypatch.setattr(_files, "_written", set())  # as in another process
    again = train(load_recipe(None, options))
    assert again.resumed_from is None and (tmp_path / "out" / "best" / "model.safetensors").is_file()


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(options: list[str]) -> None:
    train(load_recipe(None, options))
    with pytest.raises(ValueError, match=r"training.ema_decay needs the moving average of the interrupted run"):
        train(load_recipe(None, [*options, "--training.ema_decay=0.5"]))


def test_classes_that_differ_from_the_checkpoints_are_named(options: list[str], folders: Path) -> None:
    options += [f"--data.dataset={folders}", "--model.kwargs.in_chans=3"]
    train(load_recipe(None, options))
    for part in ("train", "val"):
        (folders / part / "eel").rename(folders / part / "ape")
    with pytest.raises(
        ValueError, match=r"images must have the 3 classes of the checkpoint, but lacks 'eel' and also has 'ape'"
    ):
        train(load_recipe(None, [*options, "--training.max_steps=8"]))


def test_a_cut_off_average_makes_a_checkpoint_incomplete(options: list[str], tmp_path: Path) -> None:
    train(load_recipe(None, [*options, "--training.ema_decay=0.5", "--training.save_steps=3"]))
    file = tmp_path / "out" / "checkpoint-6" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="checkpoint-6: its ema.safetensors is cut off"):
        assert last_complete_checkpoint(tmp_path / "out").name == "checkpoint-3"


def test_the_log_is_in_the_checkpoint(options: list[str], tmp_path: Path) -> None:
    train(load_recipe(None, [*options, "--training.eval_steps=3", "--training.save_steps=3"]))
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_top1" in entry] == [3]
