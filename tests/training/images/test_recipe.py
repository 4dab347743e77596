"""Recipes of image classifiers are read from YAML and checked field by field; those in recipes/ are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from moh.training import load_recipe
from moh.training.images import ImageRecipe
from moh.training.recipes import dump_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "vit").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_package_are_valid(path: Path) -> None:
    assert isinstance(load_recipe(path), ImageRecipe)


def test_there_are_recipes_for_the_published_configurations() -> None:
    names = {load_recipe(path).model.name for path in RECIPES}
    published = ("small_75", "small_80", "base_75", "base_50")
    assert {f"moh_transnext_{name}" for name in published} <= names


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = load_recipe(next(path for path in RECIPES if "b_75" in path.stem))
    training, augmentation = recipe.training, recipe.augmentation
    assert (training.learning_rate, training.warmup_lr, training.min_lr) == (1e-3, 1e-6, 1e-5)
    assert (training.epochs, training.warmup_epochs, training.weight_decay) == (300, 5, 0.05)
    assert (training.max_grad_norm, training.balance_loss_coef, recipe.model.drop_path) == (1.0, 0.01, 0.6)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.label_smoothing) == (0.8, 1.0, 0.1)
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augmentation.repeats, augmentation.crop_interpolation) == (3, "bicubic")
    assert (training.rate_changes, training.keep_best) == ("epoch", True)


def test_a_recipe_survives_its_own_yaml(options: list[str], tmp_path: Path) -> None:
    extra = ["--augmentation.crop_scale=[0.5, 1.0]", "--conversion={'shared_heads': 1, 'active_heads': 2}"]
    recipe = load_recipe(None, [*options, *extra, "--model.kwargs.depth=3"])
    assert recipe.model.kwargs["depth"] == 3 and recipe.model.kwargs["img_size"] == 8
    assert recipe.augmentation.crop_scale == [0.5, 1.0]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.drop_path=1", "model.drop_path must be at least 0 and below 1, got 1"),
        ("--model.kwargs={'num_classes': 3}", "model.kwargs must not set num_classes: it comes from the data"),
        ("--model.kwargs={'drop_path_rate': 0.1}", "model.kwargs must not set drop_path_rate: set model.drop_path"),
        ("--model.kwargs={'checkpoint_path': a.pth}", "model.kwargs must not set checkpoint_path: weights come from"),
        ("--model.kwargs.pretrained_cfg_overlay.file=a.pth", "must not set pretrained_cfg_overlay: weights come from"),
        ("--data.dataset=", "data.dataset must name a data set or a directory"),
        ("--data.std=[0.5]", r"data.mean and data.std must have equally many numbers, got \[\] and \[0.5\]"),
        ("--data.crop_pct=1.5", "data.crop_pct must be above 0 and at most 1, got 1.5"),
        ("--augmentation.repeats=0", "augmentation.repeats must be at least 1, got 0"),
        (
            "--training.epochs=3",
            "one of training.max_steps and training.epochs must be above 0 and the other 0, got 6 and 3",
        ),
        (
            "--training.max_steps=0",
            "one of training.max_steps and training.epochs must be above 0 and the other 0, got 0 and 0",
        ),
        ("--training.ema_decay=1", "training.ema_decay must be at least 0 and below 1, got 1"),
        ("--training.min_lr=0.1", "training.min_lr must be at most training.learning_rate = 0.001, got 0.1"),
        ("--augmentation.hflip=2", "augmentation.hflip must be between 0 and 1, got 2"),
        ("--augmentation.crop_scale=[0.9, 0.1]", r"augmentation.crop_scale must be \[\] or two rising numbers"),
        ("--augmentation.label_smoothing=1", "augmentation.label_smoothing must be at least 0 and below 1"),
        ("--conversion={'shared_heads': 1, 'active_heads': 2, 'calibration_images': 0}", "calibration_images must be"),
    ],
)
def test_a_wrong_field_is_named(options: list[str], override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(None, [*options, override])
    assert "\n" not in str(error.value)


def test_only_the_published_schedule_changes_per_epoch(options: list[str]) -> None:
    extra = ["--training.rate_changes=epoch", "--training.lr_scheduler_type=linear"]
    with pytest.raises(ValueError, match=r"lr_scheduler_type must be 'cosine_warmup_with_min_lr' for .*, got 'linear'"):
        load_recipe(None, [*options, *extra])


def test_mixing_needs_an_even_batch(options: list[str]) -> None:
    extra = ["--augmentation.mixup=0.8", "--training.per_device_train_batch_size=7"]
    with pytest.raises(
        ValueError, match=r"per_device_train_batch_size must be even for augmentation.mixup or cutmix, got 7"
    ):
        load_recipe(None, [*options, *extra])


def test_two_ways_to_crop_are_one_too_many(options: list[str]) -> None:
    extra = ["--augmentation.crop_scale=[0.5, 1]", "--augmentation.crop_padding=2"]
    with pytest.raises(ValueError, match=r"crop_scale and augmentation.crop_padding must not both be set"):
        load_recipe(None, [*options, *extra])
