"""Promise: `moh eval` and `moh inspect` serve image classifiers, and say what does not fit."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from moh.evaluation import evaluate_images
from moh.inspection import class_head_load
from moh.models.image_loading import ImageInput, describe, load_image_classifier, save_image_classifier
from moh.training.images.folders import FolderImages

CLASSES = ("ant", "bee", "cow")
ARGUMENTS = {"img_size": 8, "in_chans": 3, "embed_dim": 20, "depth": 2, "num_heads": 5}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MoH classifier and a dense one, on disk."""
    found = {}
    torch.manual_seed(0)
    for kind in ("75", "dense"):
        model = timm.create_model(f"moh_vit_micro_patch4_28_{kind}", num_classes=3, **ARGUMENTS)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        describe(model, ImageInput((3, 8, 8), (0.5,) * 3, (0.2,) * 3), CLASSES)
        found[kind] = tmp_path_factory.mktemp("classifier") / kind
        save_image_classifier(model, found[kind], model_args=ARGUMENTS)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(4):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root


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


def test_inspect_writes_tables_and_pictures_per_class(moh, classifiers, folder: Path, tmp_path: Path) -> None:
    result = moh(
        "inspect", classifiers["75"], "--images", folder, "--out", tmp_path / "heads", "--classes", "cow", "ant"
    )
    assert result.code == 0
    names = {f"{stem}.{suffix}" for stem in ("class_head_load", "head_load") for suffix in ("csv", "png", "svg")}
    assert {path.name for path in (tmp_path / "heads").iterdir()} == names
    expected = class_head_load(load_image_classifier(classifiers["75"]), FolderImages(folder))
    with open(tmp_path / "heads" / "class_head_load.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["load"]) for row in rows] == [row["load"] for row in expected.rows()]
    assert re.match(r"layer   0:  \d\d % of the heads used; a class's load of a routed head \d", result.out[0])
    assert result.out[-1].endswith("(12 images)")


def test_a_classifier_needs_images_and_images_need_a_classifier(moh, classifiers, base_dir: Path, folder: Path) -> None:
    for command in (["eval"], ["inspect", "--out", "x"]):
        result = moh(command[0], classifiers["75"], *command[1:])
        assert result.code == 2 and "--images must say on which images" in result.err[0] and len(result.err) == 1
        result = moh(command[0], base_dir, *command[1:], "--images", folder)
        assert result.code == 2 and "--images needs an image classifier in timm's format" in result.err[0]
    assert "must not both be given" in moh("eval", base_dir, "--images", folder, "--files", folder).err[0]
    assert "--classes is for image classifiers" in moh("inspect", base_dir, "--out", "x", "--classes", "ant").err[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "/nowhere/at/all"], "a directory or a data set's name, but there is no '/nowhere/at/all'"),
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
    assert result.code == 2 and "lacks 'cow' and has beside them 'emu'" in result.err[0]


def test_a_dense_classifier_has_no_heads_to_inspect(moh, classifiers, folder: Path, tmp_path: Path) -> None:
    result = moh("inspect", classifiers["dense"], "--images", folder, "--out", tmp_path / "heads")
    assert result.code == 2 and "model has no MoH layers" in result.err[0] and not (tmp_path / "heads").exists()


def test_train_runs_a_recipe_of_images(moh, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: image_classification\n"
        "model: {name: moh_vit_micro_patch4_28_75, kwargs: {img_size: 8, embed_dim: 20, depth: 2, num_heads: 5}}\n"
        f"data: {{dataset: {folder}}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1}}\n"
    )
    result = moh("train", recipe, "--training.precision=fp32", "--training.extra={'disable_tqdm': true}")
    assert result.code == 0, result.err
    assert result.out[-1].startswith(f"{tmp_path / 'out' / 'model'}: step 2, loss ")
    assert moh("eval", tmp_path / "out" / "model", "--images", folder).code == 0


@pytest.mark.parametrize("kind", ["75", "dense"])
def test_inspect_writes_a_page_of_some_images_of_each_class(
    moh, classifiers, folder: Path, tmp_path, kind: str
) -> None:
    told = moh(
        "inspect", classifiers[kind], "--images", folder, "--html", tmp_path / "page.html", "--classes", "ant", "cow"
    )
    assert told.code == 0 and "4 images" in told.out[0]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    samples = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])["samples"]
    assert [sample["group"] for sample in samples] == ["ant", "ant", "cow", "cow"]
    assert samples[0]["layers"][0]["grid"] == [0, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_an_unknown_class_or_no_target_is_refused_before_anything_is_written(
    moh, classifiers, folder, tmp_path
) -> None:
    page = tmp_path / "page.html"
    told = moh("inspect", classifiers["75"], "--images", folder, "--html", page, "--classes", "dog")
    assert told.code == 2 and "--classes must be among ant, bee, cow, got dog" in told.err[0]
    assert "--out DIR or --html FILE" in moh("inspect", classifiers["75"], "--images", folder).err[0]
    told = moh("inspect", classifiers["75"], "--images", folder, "--html", tmp_path / "no" / "page.html")
    assert "--html must be a file in a directory that exists" in told.err[0]
    assert list(tmp_path.iterdir()) == []
