"""Promise: `moh eval` evaluates image classifiers, and reports what does not match."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from moh.data.images.formats import FolderImages
from moh.evaluation import evaluate_images
from moh.models.timm.loading import load_image_classifier


@pytest.mark.parametrize("kind", ["75", "dense"])
def test_eval_of_a_classifier_measures_the_images(moh, classifiers, folder: Path, kind: str) -> None:
    expected = evaluate_images(load_image_classifier(classifiers[kind]), FolderImages(folder))
    read = json.loads(moh("eval", classifiers[kind], "--images", folder, "--json").out[0])
    assert read.pop("images_per_second") > 0
    assert read == {
        "top1": pytest.approx(expected.top1),
        "top5": pytest.approx(100),
        "loss": pytest.approx(expected.loss),
        "images": 12,
        "skipped": 0,
        "share": None if kind == "dense" else pytest.approx(expected.share),
        "per_class": pytest.approx(expected.per_class),
    }
    told = moh("eval", classifiers[kind], "--images", folder, "--batch-size", 5)
    assert told.code == 0
    assert told.out[0].startswith(
        f"top-1 {expected.top1:.2f} %, top-5 100.00 %, loss {expected.loss:.4f} (12 images, 0 "
    )
    assert ("dense: every token uses all heads" in told.out[1]) == (kind == "dense")


def test_eval_of_some_images_spreads_over_the_classes(moh, classifiers, folder: Path) -> None:
    read = json.loads(moh("eval", classifiers["75"], "--images", folder, "--max-images", 3, "--json").out[0])
    assert read["images"] == 3 and None not in read["per_class"].values()


def test_a_classifier_needs_images_and_images_need_a_classifier(moh, classifiers, base_dir: Path, folder: Path) -> None:
    for command in (["eval"], ["inspect", "--output", "x"]):
        result = moh(command[0], classifiers["75"], *command[1:])
        assert result.code == 2 and "--images must be given, because" in result.err[0] and len(result.err) == 1
        result = moh(command[0], base_dir, *command[1:], "--images", folder)
        assert result.code == 2 and "--images needs an image classifier, and" in result.err[0]
    assert "must not both be given" in moh("eval", base_dir, "--images", folder, "--files", folder).err[0]
    assert "--classes is for image classifiers" in moh("inspect", base_dir, "--output", "x", "--classes", "ant").err[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--images", "/nowhere/at/all"],
            "a directory, a .tar file or a data set's name, but there is no '/nowhere/at/all'",
        ),
        (["--max-images", 0], "at least 1 image is needed, got 0"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(moh, classifiers, folder: Path, argv, message) -> None:
    images = [] if "--images" in argv else ["--images", folder]
    result = moh("eval", classifiers["75"], *images, *argv)
    assert result.code == 2 and len(result.err) == 1 and message in result.err[0]


def test_other_classes_than_the_checkpoints_are_named(moh, classifiers, folder: Path, tmp_path: Path) -> None:
    for name in ("ant", "bee", "emu"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / name / "0.png")
    result = moh("eval", classifiers["75"], "--images", tmp_path / "other")
    assert result.code == 2 and "lacks 'cow' and also has 'emu'" in result.err[0]


def test_train_runs_a_recipe_of_images(moh, folder: Path, tmp_path: Path) -> None:
    command = [
        "train",
        _recipe(tmp_path, folder),
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true}",
    ]
    result = moh(*command)
    assert result.code == 0, result.err  # logging_steps is 10
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'out' / 'model'))}: step 2, loss \d+\.\d+, fp32", result.out[-1])
    again = moh(*command, "--json")
    assert f"step 2, loss {json.loads(again.out[-1])['loss']:.4f}" in result.out[-1]
    assert moh("eval", tmp_path / "out" / "model", "--images", folder).code == 0


def test_train_reports_that_no_loss_was_logged(moh, folder: Path, tmp_path: Path) -> None:
    told = moh(
        "train",
        _recipe(tmp_path, folder),
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true, 'logging_strategy': 'no'}",
    )
    assert told.out[-1] == f"{tmp_path / 'out' / 'model'}: no loss was logged, fp32", told.err


def _recipe(folder: Path, images: Path) -> Path:
    """A run of two steps, in `folder / "out"`."""
    file = folder / "recipe.yaml"
    file.write_text(
        "task: image_classification\n"
        "model: {name: moh_vit_micro_patch4_28_75, kwargs: {img_size: 8, embed_dim: 20, depth: 2, num_heads: 5}}\n"
        f"data: {{dataset: {images}}}\n"
        f"training: {{output_dir: {folder / 'out'}, max_steps: 2, per_device_train_batch_size: 4}}\n"
    )
    return file


def test_curve_of_a_classifier_draws_accuracy_and_images_per_second(moh, classifiers, folder: Path, tmp_path) -> None:
    out, images = tmp_path / "curve", FolderImages(folder)
    told = moh("curve", classifiers["75"], "--output", out, "--images", folder, "--dense", classifiers["dense"])
    assert told.code == 0, told.err
    assert sorted(file.name for file in out.iterdir()) == ["curve.csv", "curve.json", "curve.png", "curve.svg"]
    data = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    shares = [point["share"] for point in data["points"]]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 2
    expected = evaluate_images(load_image_classifier(classifiers["75"]), images)
    own = [point["top1"] for point in data["points"] if point["share"] == pytest.approx(expected.share)]
    assert own == [pytest.approx(expected.top1)]
    dense = evaluate_images(load_image_classifier(classifiers["dense"]), images)
    assert data["dense"]["top1"] == pytest.approx(dense.top1)
    assert told.out[-2].startswith(f"the dense model: top-1 {dense.top1:.2f} %, ")
