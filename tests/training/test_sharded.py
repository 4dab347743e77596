"""Weights and optimiser sharded over two processes (FSDP2) train as one process does, and resume exactly.

On the CPU, over gloo, with the settings of `recipes/accelerate/fsdp2.yaml` as `accelerate launch` passes them.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from moh.training import load_recipe, train
from moh.training.checkpoints import (
    check_shards,
    checkpoint_problem,
    has_sharded_weights,
    load_sharded_weights,
    shard_on_cpus,
)

accelerate = pytest.importorskip("accelerate")

CONSTANT = ["--training.lr_scheduler_type=constant", "--training.warmup_steps=0", "--training.save_steps=2"]
RUNS = {  # name -> options in addition to the common ones
    "dense": [],
    "converted": ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--conversion.calibration_tokens=256"],
}


@pytest.mark.parametrize("name", ["converted", pytest.param("dense", marks=pytest.mark.slow)])
def test_sharded_runs_equal_whole_ones_and_go_on_exactly(team, options: list[str], tmp_path: Path, name: str) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    run = [*options, *CONSTANT, *RUNS[name]]
    whole = [*run, f"--training.output_dir={two / 'whole'}", "--training.max_steps=4"]
    cut = [*run, f"--training.output_dir={two / 'cut'}"]
    more = ([*cut, f"--training.max_steps={count}"] for count in (2, 4, 4))  # the last has nothing left to do
    losses = team("losses", 2, runs=[whole, *more], accelerate="fsdp2.yaml")[0]
    assert losses[1] == losses[0][:2] and losses[2] == losses[3] == losses[0] and len(set(losses[0])) == 4
    a, b = (load_file(two / kind / "model" / "model.safetensors") for kind in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[tensor], b[tensor]) for tensor in a)

    checkpoint = two / "whole" / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()  # the second process wrote its part
    assert (checkpoint / "optimizer_0" / "__1_0.distcp").exists()
    assert not list(checkpoint.glob("*.safetensors"))
    assert checkpoint_problem(checkpoint) is None
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    assert checkpoint_problem(checkpoint) == "its optimizer_0 is cut off"

    batch = ["--training.per_device_train_batch_size=4", "--training.max_steps=4", f"--training.output_dir={one}"]
    assert losses[0] == pytest.approx(team("losses", 1, runs=[[*run, *batch]])[0][0], abs=1e-4)
    single = load_file(one / "model" / "model.safetensors")
    assert single.keys() == a.keys() and all((single[tensor] - a[tensor]).abs().max() < 1e-3 for tensor in a)


def test_shards_are_read_into_a_whole_model_or_refused(dense, tmp_path: Path) -> None:
    dcp.save({"model": dense.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    assert has_sharded_weights(tmp_path)
    expected = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for parameter in dense.parameters():
        torch.nn.init.zeros_(parameter)
    load_sharded_weights(dense, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.state_dict().items())
    dense.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="do not match the model"):
        load_sharded_weights(dense, tmp_path)


class WritesAFile:
    """A pickle that writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.file, "w")


@pytest.mark.parametrize("where", ["table", "entry", "table of the optimiser"])
def test_shards_that_would_run_code_are_not_read(dense, options: list[str], tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    train(load_recipe(None, [*options, "--training.save_steps=6"]))
    (checkpoint,) = out.glob("checkpoint-*")
    (checkpoint / "model.safetensors").unlink()
    evil, weights = WritesAFile(tmp_path / "written"), checkpoint / "pytorch_model_fsdp_0"
    dcp.save({"model": dense.state_dict(), "step": 6}, checkpoint_id=weights, no_dist=True)
    check_shards(checkpoint)
    folder = weights if where != "table of the optimiser" else checkpoint / "optimizer_0"
    if where == "entry":
        dcp.save({"model": {name: evil for name in dense.state_dict()}}, checkpoint_id=weights, no_dist=True)
    else:
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
    (tmp_path / "written").unlink(missing_ok=True)
    for read in (
        lambda: load_sharded_weights(dense, checkpoint),
        lambda: train(load_recipe(None, options)),
    ):
        with pytest.raises(ValueError, match=rf"{folder}/.metadata can't be read without running code \(.*open"):
            read()
    assert not (tmp_path / "written").exists()


def test_only_version_2_is_sharded_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = Namespace(distributed_type=accelerate.DistributedType.MULTI_CPU)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert shard_on_cpus(cpus, None) is False
    with pytest.raises(ValueError, match="FSDP on CPUs must be version 2, got 1"):
        shard_on_cpus(cpus, accelerate.utils.FullyShardedDataParallelPlugin(fsdp_version=1))
