"""Promise: many images become files, an interruption costs only unfinished batches, processes share the work."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from moh.sampling import SamplingSettings, files, image_grid, sample, sample_to_files, save_image_model, write_npz

LABELS = [i % 5 for i in range(11)]
SETTINGS = SamplingSettings(steps=3, guidance=1.5)


def test_pngs_a_grid_and_arrays_hold_the_images(tiny, tmp_path: Path) -> None:
    model = tiny(class_names=("tench, Tinca tinca", "great white", "c", "d", "e"))
    sample_to_files(model, LABELS, SETTINGS, out=tmp_path / "a" / "out", npz=tmp_path / "b" / "all.npz", batch_size=4)
    images = sample(model, LABELS, SETTINGS)
    pngs = sorted((tmp_path / "a" / "out" / "images").iterdir())
    assert len(pngs) == 11 and [p.name for p in pngs[:3]] == ["00000-tench.png", "00001-great_white.png", "00002-c.png"]
    for png, image in zip(pngs, images, strict=True):
        assert (pil_to_tensor(Image.open(png)).int() - image.int()).abs().max() <= 1
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == ["grid.png", "images"]
    assert pil_to_tensor(Image.open(tmp_path / "a" / "out" / "grid.png")).shape == (3, 2 + 3 * 10, 2 + 4 * 10)
    arrays = np.load(tmp_path / "b" / "all.npz")
    assert arrays["arr_0"].shape == (11, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
    assert np.abs(arrays["arr_0"][..., 2].astype(int) - images[:, 0].numpy()).max() <= 1  # grey became coloured
    assert arrays["arr_1"].tolist() == LABELS
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["all.npz"]
    sample_to_files(model, [1], SETTINGS, out=tmp_path / "a" / "out")
    assert [p.name for p in (tmp_path / "a" / "out" / "images").iterdir()] == ["00000-great_white.png"]


def test_pictures_of_the_user_are_kept(tiny, tmp_path: Path) -> None:
    mine = tmp_path / "images" / "00000-mine.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"images holds files and there is no grid\.png next to it"):
        sample_to_files(tiny(), [1], SETTINGS, out=tmp_path)
    assert [p.name for p in tmp_path.rglob("*.*")] == ["00000-mine.png"]
    mine.unlink()
    sample_to_files(tiny(), [1, 2], SETTINGS, out=tmp_path)
    for name in ("2024-beach.png", "00001-a b.png", "012345-cat.png", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(b"mine")
    sample_to_files(tiny(), [3], SETTINGS, out=tmp_path)
    names = {"00000-3.png", "2024-beach.png", "00001-a b.png", "012345-cat.png", "notes.txt"}
    assert {p.name for p in (tmp_path / "images").iterdir()} == names


def test_an_interruption_while_pngs_are_written_is_no_obstacle(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.write_png

    def interrupted(path: Path, image: torch.Tensor) -> None:
        if path.name.startswith("00002"):
            raise KeyboardInterrupt
        real(path, image)

    monkeypatch.setattr(files, "write_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_to_files(tiny(), [1, 2, 3], SETTINGS, out=tmp_path)
    monkeypatch.setattr(files, "write_png", real)
    sample_to_files(tiny(), [1, 2, 3], SETTINGS, out=tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 3


@pytest.mark.parametrize("batch_size", [3, 5])
def test_an_interrupted_run_draws_only_what_is_missing(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    real, numbers = files.sample_batches, []

    def interrupted(*args, indices, **options):
        if len(numbers) == 6:
            raise KeyboardInterrupt
        numbers.extend(indices)
        return real(*args, indices=indices, **options)

    monkeypatch.setattr(files, "sample_batches", interrupted)
    npz = tmp_path / "all.npz"
    with pytest.raises(KeyboardInterrupt):
        sample_to_files(tiny(), LABELS, SETTINGS, npz=npz, batch_size=3)
    assert numbers == [0, 1, 2, 3, 4, 5] and not npz.exists()

    def recorded(*args, indices, **options):
        numbers.extend(indices)
        return real(*args, indices=indices, **options)

    monkeypatch.setattr(files, "sample_batches", recorded)
    sample_to_files(tiny(), LABELS, SETTINGS, npz=npz, batch_size=batch_size)
    assert numbers == list(range(11))
    whole = sample(tiny(), LABELS, SETTINGS)[:, 0].numpy().astype(int)
    assert np.abs(np.load(npz)["arr_0"][..., 0] - whole).max() <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["all.npz"]


def test_parts_of_another_run_are_not_mixed_in(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz, model = tmp_path / "all.npz", tiny()
    monkeypatch.setattr(files, "_finish", lambda *args: None)  # killed before the last step: the parts stay
    sample_to_files(model, LABELS, SETTINGS, npz=npz)
    parts = tmp_path / ".all.npz.moh-parts"
    assert [p.name for p in parts.iterdir()] == ["00000000-00000011.safetensors"]
    other = tiny()
    with torch.no_grad():
        other.transformer.proj_out.bias[0] += 1
    for different in (
        (model, LABELS[:-1], SETTINGS),
        (model, LABELS, dataclasses.replace(SETTINGS, seed=1)),
        (other, LABELS, SETTINGS),
        (tiny().to(dtype=torch.bfloat16), LABELS, SETTINGS),
    ):
        with pytest.raises(ValueError, match=r"all\.npz\.moh-parts holds parts of another run"):
            sample_to_files(*different, npz=npz)
    (part,) = parts.iterdir()
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00000011\.safetensors can't be read .*: delete it"):
        sample_to_files(model, LABELS, SETTINGS, npz=npz)


def test_nan_reaches_no_file(tiny, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.transformer.class_embedder.weight[4] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity in step 1 of 3"):
        sample_to_files(model, LABELS, SETTINGS, out=tmp_path / "out", npz=tmp_path / "all.npz", batch_size=5)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.safetensors"))  # classes 0 to 4 were the first batch


@pytest.mark.timeout(240)
def test_two_processes_draw_what_one_draws(tiny, tmp_path: Path) -> None:
    save_image_model(tiny(), tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--", "moh"]
    options = ["--num", "11", "--steps", "3", "--guidance", "1.5", "--batch-size", "4", "--npz", tmp_path / "two.npz"]
    command = [*launcher, "sample", tmp_path / "model", *options, "--scheduler", "ddpm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, timeout=230, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{tmp_path}/two.npz: 11 images"]
    settings = dataclasses.replace(SETTINGS, scheduler="ddpm")
    expected = sample(tiny(), LABELS, settings)[:, 0].numpy().astype(int)
    arrays = np.load(tmp_path / "two.npz")
    assert np.abs(arrays["arr_0"][..., 0] - expected).max() <= 1
    assert arrays["arr_1"].tolist() == LABELS


@pytest.mark.parametrize(("todo", "processes"), [(list(range(11)), 1), (list(range(11)), 3), ([0, 1, 5, 6, 7, 9], 2)])
def test_work_is_shared_without_gaps(todo: list[int], processes: int) -> None:
    shares = [files._share(todo, 4, process, processes) for process in range(processes)]
    assert sorted(i for share in shares for batch in share for i in batch) == todo
    assert all(0 < len(batch) <= 4 for share in shares for batch in share)
    assert all(shares), "no process is idle"


def test_the_array_file_is_read_in_batches_and_counted(tmp_path: Path) -> None:
    images = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).reshape(5, 3, 2, 2)
    batches = [(images[:2], torch.tensor([7, 8])), (images[2:], torch.tensor([9, 9, 9]))]
    write_npz(tmp_path / "x.npz", batches, count=5, shape=(3, 2, 2))
    arrays = np.load(tmp_path / "x.npz")
    assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert arrays["arr_1"].tolist() == [7, 8, 9, 9, 9]
    with pytest.raises(ValueError, match="count must be the number of images, 5, got 6"):
        write_npz(tmp_path / "y.npz", batches, count=6, shape=(3, 2, 2))
    assert not (tmp_path / "y.npz").exists()


def test_a_grid_has_the_columns_that_are_asked_for() -> None:
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    assert image_grid(images).shape == (3, 22, 32)  # three columns are about square
    assert image_grid(images, columns=2).shape == (3, 32, 22)


def test_wrong_targets_are_told(tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out or npz must be given, got neither"):
        sample_to_files(tiny(), [0], SETTINGS)
    with pytest.raises(ValueError, match=r"npz must be a file that ends in \.npz"):
        sample_to_files(tiny(), [0], SETTINGS, npz=tmp_path / "images")
    with pytest.raises(ValueError, match="labels must have at least one entry"):
        sample_to_files(tiny(), [], SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sample_to_files(tiny(), [0], SETTINGS, out=tmp_path, batch_size=0)
