"""`accelerate launch` with the configurations of `recipes/accelerate/` and a recipe trains on two processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from moh.training import load_recipe, train

RECIPES = Path(__file__).parents[2] / "recipes"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _compiles() -> bool:
    """Whether DeepSpeed can compile what it compiles when it starts on CPUs."""
    return find_spec("deepspeed") is not None and shutil.which("c++") is not None


@pytest.mark.parametrize(
    ("name", "of_the_second_process"),
    [
        ("ddp.yaml", None),
        ("fsdp2.yaml", "pytorch_model_fsdp_0/__1_0.distcp"),
        pytest.param(
            "deepspeed_zero3.yaml",
            "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt",
            marks=pytest.mark.skipif(not _compiles(), reason="DeepSpeed or a C++ compiler is not installed"),
        ),
    ],
    ids=["ddp", "fsdp2", "deepspeed"],
)
def test_a_recipe_trains_on_the_processes_that_accelerate_starts(
    base_dir: Path, text_file: Path, tmp_path: Path, name: str, of_the_second_process: str | None
) -> None:
    recipe, two, one = RECIPES / "llm" / "tiny.yaml", tmp_path / "two", tmp_path / "one"
    options = [f"--model.path={base_dir}", f"--data.files=['{text_file}']"]
    command = [*LAUNCHER, "--config_file", RECIPES / "accelerate" / name, "-m", "moh", "train", recipe, *options]
    command.append(f"--training.output_dir={two}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, timeout=500, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load((two / "recipe.yaml").read_text())["training"]["precision"] == "fp32"
    if of_the_second_process is not None:
        assert (two / "checkpoint-4" / of_the_second_process).exists()

    batch = ["--training.per_device_train_batch_size=4", f"--training.output_dir={one}"]
    train(load_recipe(recipe, [*options, *batch]))
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (two, one))
    assert ours.keys() == theirs.keys()
    assert all((ours[tensor] - theirs[tensor]).abs().max() < 1e-3 for tensor in ours)
