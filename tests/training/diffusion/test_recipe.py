"""Recipes of diffusion models are read from YAML, wrong ones rejected in one line; ours have the paper's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from moh.models.diffusers import DIT_NAMES
from moh.training.diffusion.recipe import DiffusionRecipe, SampleGridRecipe
from moh.training.recipes import dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "dit").glob("*.yaml"))
YAML = """
task: diffusion
model: {preset: moh_dit_s_2_75}
data: {dataset: images, image_size: 256, vae: vae}
training: {output_dir: out, max_steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


def test_a_file_gives_typed_values_and_the_papers_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert type(recipe) is DiffusionRecipe
    training = recipe.training
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (1e-4, "constant", 0)
    assert (training.ema_decay, training.ema_warmup, training.balance_loss_coef) == (0.9999, False, 0.01)
    assert (training.weight_decay, training.max_grad_norm, training.samples) == (0, 0, SampleGridRecipe())
    assert recipe.data.flip and recipe.diffusion.train_steps == 1000


def test_nested_fields_can_be_overridden_and_read_back(file: Path, tmp_path: Path) -> None:
    overrides = ["--training.samples.every=5", "--training.samples.classes=[3, 1]", "--model.overrides={patch_size: 4}"]
    recipe = load_recipe(file, overrides)
    assert recipe.training.samples == SampleGridRecipe(every=5, classes=[3, 1])
    assert recipe.model.overrides == {"patch_size": 4}
    (tmp_path / "dump.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.overrides={in_channels: 4}", "model.overrides must not set in_channels: it comes from the data"),
        ("--data.image_size=0", "data.image_size must be at least 1, got 0"),
        ("--data.image_size=x", "data.image_size.*int.*x"),
        ("--data.dataset=", "data.dataset must name a data set or a directory"),
        ("--diffusion.train_steps=1", "diffusion.train_steps must be at least 2, got 1"),
        ("--diffusion.beta_end=1", "beta_start and diffusion.beta_end must be between 0 and 1 and not fall"),
        ("--training.ema_decay=1", "training.ema_decay must be at least 0 and below 1, got 1"),
        ("--training.max_grad_norm=-1", "training.max_grad_norm must be at least 0, got -1"),
        ("--training.samples.guidance=-1", "training.samples.guidance must be at least 0, got -1"),
        ("--training.workers=-1", "training.workers must be at least 0, got -1"),
        ("--training.samples.guidance=.inf", "training.samples.guidance must be a finite number, got inf"),
        ("--training.samples.guidance=.nan", "training.samples.guidance must be a finite number, got nan"),
        (
            "--training.samples={scheduler: ddpm, steps: 1}",
            "training.samples.steps must be at least 2 for ddpm, got 1",
        ),
        ("--training.samples.rows=0", "training.samples.rows must be at least 1, got 0"),
        ("--training.samples.steps=2000", "training.samples.steps must be at most diffusion.train_steps = 1000"),
        ("--training.samples.scheduler=euler", "'ddim', 'dpm\\+\\+', 'ddpm'.*euler"),
        ("--training.sample.every=3", "training.sample"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(file, [override])
    assert "\n" not in str(error.value) and str(error.value).startswith(str(file))


def test_latents_need_a_vae(file: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.latents needs data\.vae, whose latents they are"):
        load_recipe(file, ["--data.vae=null", "--data.latents=somewhere"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training.output_dir == f"runs/{path.stem}"
    assert recipe.model.preset in DIT_NAMES


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.endswith("_paper")], ids=lambda path: path.stem)
def test_the_papers_recipes_train_as_the_paper_says(path: Path) -> None:
    recipe = load_recipe(path)
    training = recipe.training
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 256  # on eight GPUs
    assert training.max_steps == (7_000_000 if "_xl_" in path.stem else 400_000)
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (1e-4, "constant", 0)
    assert (training.weight_decay, training.max_grad_norm, training.balance_loss_coef) == (0, 0, 0.01)
    assert (training.ema_decay, training.ema_warmup, recipe.data.flip) == (0.9999, False, True)
    assert recipe.data.image_size == 256 and recipe.data.vae is not None
    assert not recipe.model.overrides  # label dropout 0.1 is the model's own
