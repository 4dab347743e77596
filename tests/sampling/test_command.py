"""Promise: `moh sample` draws what `moh.sampling` draws; bad input gives exit code 2 and one line that names it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from moh.cli import main
from moh.sampling import SamplingSettings, sample, save_image_model

NAMES = ("cat", "dog", "3", "bird", "fish")


@pytest.fixture
def checkpoint(tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_image_model(tiny(class_names=NAMES), folder)
    return folder


@pytest.fixture
def moh(capsys: pytest.CaptureFixture[str]):
    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        try:
            code = main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_named_classes_are_drawn(moh, checkpoint: Path, tiny, tmp_path: Path, scheduler: str) -> None:
    options = ["--guidance", 1.5, "--steps", 4, "--scheduler", scheduler, "--seed", 7, "--num", 3]
    code, out, err = moh("sample", checkpoint, "--classes", "dog", 4, *options, "--output", tmp_path / "out")
    assert code == 0, err
    assert out == [f"{tmp_path}/out: 3 images"]
    expected = sample(tiny(), [1, 4, 1], SamplingSettings(scheduler=scheduler, steps=4, guidance=1.5, seed=7))
    pngs = sorted((tmp_path / "out" / "images").iterdir())
    assert [p.name for p in pngs] == ["00000-dog.png", "00001-fish.png", "00002-dog.png"]
    assert torch.equal(torch.stack([pil_to_tensor(Image.open(p)) for p in pngs]), expected)
    assert (tmp_path / "out" / "grid.png").is_file()


def test_all_classes_are_drawn_unless_some_are_named(moh, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = moh("sample", checkpoint, "--steps", 2, "--npz", tmp_path / "x.npz", "--output", tmp_path / "out")
    assert code == 0 and out == [f"{tmp_path}/out and {tmp_path}/x.npz: 5 images"]
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4]
    code, out, _ = moh("sample", checkpoint, "--steps", 2, "--npz", tmp_path / "x.npz", "--json")
    assert json.loads(out[0]) == {"output": None, "npz": f"{tmp_path}/x.npz", "images": 5} and len(out) == 1


def test_classes_may_be_random_and_are_the_seeds(moh, checkpoint: Path, tmp_path: Path) -> None:
    def labels(num: int, seed: int) -> list[int]:
        file = tmp_path / f"{num}-{seed}.npz"
        options = ["--random-classes", "--classes", 1, "bird", "--steps", 1, "--num", num, "--seed", seed]
        assert moh("sample", checkpoint, *options, "--npz", file)[0] == 0
        return np.load(file)["arr_1"].tolist()

    drawn = labels(20, 0)
    assert set(drawn) == {1, 3} and drawn != [1, 3] * 10
    assert labels(7, 0) == drawn[:7]  # the class of image i, like its noise, does not depend on how many are drawn
    assert labels(20, 1) != drawn


def test_bfloat16_is_close_to_float32(moh, checkpoint: Path, tmp_path: Path) -> None:
    arrays = []
    for dtype in ("float32", "bfloat16"):
        file = tmp_path / f"{dtype}.npz"
        assert moh("sample", checkpoint, "--steps", 4, "--num", 10, "--dtype", dtype, "--npz", file)[0] == 0
        arrays.append(np.load(file)["arr_0"].astype(float))
    assert 0 < np.abs(arrays[0] - arrays[1]).mean() < 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "1", "cow"], r"class must be an id between 0 and 4 or a name \(cat, dog, .*\), got 'cow'"),
        (["--classes", "5"], "class must be between 0 and 4, got 5"),
        (["--guidance", "-1"], "guidance must be a number of at least 0 .*, got -1.0"),
        (["--steps", "0"], "steps must be at least 1 for ddim, got 0"),
        (["--steps", "2000"], "steps must be at most those of the diffusion, 1000, got 2000"),
        (["--num", "0"], "--num must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--guided-channels", "2", "--guidance", "2"], "guided_channels must be between 1 and 1, got 2"),
        (["--npz", "x.npy"], r"npz must be a file that ends in \.npz, got x\.npy"),
        (["--vae", "/nowhere"], "vae '/nowhere' can't be loaded"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_are_told(moh, checkpoint: Path, tmp_path: Path, argv: list[str], message: str) -> None:
    target = [] if "--npz" in argv else ["--output", tmp_path / "out"]
    code, out, err = moh("sample", checkpoint, *argv, *target)
    assert code == 2 and not out and len(err) == 1, err
    assert re.search(f"^moh sample: .*{message}", err[0])
    assert not list(tmp_path.rglob("*.png"))


def test_wrong_checkpoints_and_targets_are_told(moh, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = moh("sample", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert code == 2 and "checkpoint must be a directory or a hub name, but there is no directory" in err[0]
    code, _, err = moh("sample", checkpoint)
    assert code == 2 and "--output DIR or --npz FILE must be given for the images" in err[0]
    code, _, err = moh("sample", checkpoint, "--output", checkpoint / "model_index.json" / "below")
    assert code == 2 and "can't be written" in err[0]


def test_nan_ends_with_one_line(moh, checkpoint: Path, tiny, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.transformer.proj_out.bias[0] = float("nan")
    save_image_model(model, checkpoint)
    code, _, err = moh("sample", checkpoint, "--steps", 3, "--output", tmp_path / "out")
    assert code == 1 and len(err) == 1
    assert err[0].startswith(
        "moh sample: the model returned NaN or infinity in step 1 of 3 (t = 999), for image 0, 1, 2, 3, 4"
    )
