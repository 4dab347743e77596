"""Training on several processes gives the losses, balance losses and weights of one process with the same global batch.

Sharded checkpoints are resumed on a different number of processes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file


def run(
    team, options: list[str], out: Path, size: int, *more: str, accelerate: str | None = None
) -> list[tuple[float, float]]:
    """(loss, balance loss) of every step, logged alike by all processes."""
    own = [f"--training.output_dir={out}", f"--training.per_device_train_batch_size={12 // size}"]
    logs = team("train", size, options=[*options, *own, *more], accelerate=accelerate)
    return [(entry["loss"], entry["balance_loss"]) for entry in logs[0] if "loss" in entry]


def assert_same_weights(a: Path, b: Path, tolerance: float = 1e-3) -> None:
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def one(team, tmp_path_factory):
    """Options -> folder and losses of a run of one process, which runs once."""
    runs = {}

    def get(options: list[str]):
        if "one" not in runs:
            folder = tmp_path_factory.mktemp("one")
            runs["one"] = folder, run(team, options, folder, 1)
        return runs["one"]

    return get


@pytest.mark.parametrize(
    "accelerate",
    [
        pytest.param(None, id="ddp"),
        pytest.param("fsdp2.yaml", id="fsdp2"),
        pytest.param(
            "deepspeed_zero3.yaml",
            id="deepspeed",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ),
    ],
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)], ids="{}_processes".format)
def test_processes_train_as_one_does(team, one, options, tmp_path: Path, accelerate: str | None, size: int) -> None:
    folder, expected = one(options)
    assert len(set(expected)) == 4
    losses = run(team, options, tmp_path / "many", size, accelerate=accelerate)
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert_same_weights(tmp_path / "many", folder)


def test_the_balance_loss_of_each_process_alone_is_another(team, one, options, tmp_path: Path) -> None:
    _, expected = one(options)
    alone = run(team, options, tmp_path / "alone", 2, "--training.balance_loss_scope=process", "--training.max_steps=1")
    assert alone[0] != pytest.approx(expected[0], abs=2e-4)


@pytest.mark.slow
def test_a_sharded_checkpoint_of_two_processes_is_gone_on_from_by_four(team, options, tmp_path: Path) -> None:
    saved = [*options, "--training.save_steps=2"]
    whole = run(team, saved, tmp_path / "whole", 2, accelerate="fsdp2.yaml")
    run(team, saved, tmp_path / "moved", 2, "--training.max_steps=2", accelerate="fsdp2.yaml")
    assert (tmp_path / "moved" / "checkpoint-2" / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()
    losses = run(team, saved, tmp_path / "moved", 4, accelerate="fsdp2.yaml")
    assert losses[:2] == whole[:2]
    for ours, theirs in zip(losses, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert_same_weights(tmp_path / "moved", tmp_path / "whole")


def test_activation_checkpointing_changes_nothing_but_memory(team, one, options, tmp_path: Path) -> None:
    folder, expected = one(options)
    assert run(team, options, tmp_path / "out", 1, "--training.gradient_checkpointing=true") == expected
    assert_same_weights(tmp_path / "out", folder, tolerance=0)
