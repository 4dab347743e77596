"""Recipes are read from YAML and overridden on the command line; wrong ones are rejected in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from moh.training.language.recipe import ConversionRecipe
from moh.training.recipes import dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "llm"
YAML = """
model: {path: base}
conversion: {shared_heads: 3, active_heads: 4}
training: {output_dir: out, max_steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


def test_a_file_gives_typed_values_and_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.model.path, recipe.training.max_steps, recipe.data.corpus) == ("base", 10, "django-docs")
    assert recipe.conversion == ConversionRecipe(shared_heads=3, active_heads=4)
    assert recipe.training.precision == "auto"


def test_the_command_line_wins_over_the_file(file: Path) -> None:
    overrides = ["--training.max_steps", "20", "--conversion.router=query_norm", "--data.files=[a.txt, b c.txt]"]
    overrides += ["--training.extra", "{optim: sgd}", "--training.learning_rate=1e-5"]
    recipe = load_recipe(file, overrides)
    assert recipe.training.max_steps == 20
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.extra == {"optim": "sgd"}
    assert recipe.conversion == ConversionRecipe(shared_heads=3, active_heads=4, router="query_norm")
    assert recipe.data.files == ["a.txt", "b c.txt"]


def test_conversion_null_is_the_dense_control(file: Path) -> None:
    assert load_recipe(file, ["--conversion", "null"]).conversion is None


def test_a_dumped_recipe_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["--data.files=[a.txt]", "--training.extra={optim: sgd}"])
    (tmp_path / "dump.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.max_steps=x", "training.max_steps.*int.*x"),
        ("--training.max_steps=0", "training.max_steps must be at least 1, got 0"),
        ("--training.max_stepz=3", "training.max_stepz"),
        ("--training.precision=fp8", "training.precision.*'auto', 'bf16', .*'fp32'.*fp8"),
        ("--training.balance_loss_scope=all", "training.balance_loss_scope.*'process', 'global'.*all"),
        ("--training.distillation_weight=2", "distillation_weight must be between 0 and 1, got 2"),
        ("--training.distillation_temperature=0", "distillation_temperature must be above 0, got 0"),
        ("--training.logging_steps=20", "save_steps must be a multiple of training.logging_steps = 20, got 50"),
        ("--training.learning_rate=-1", "learning_rate must be at least 0, got -1"),
        ("--training.extra={hub_token: hf_secret}", "training.extra must not set hub_token, which would be written"),
        ("--data.corpus=bible", "data.corpus must be one of django-docs, .* got 'bible'"),
        ("--data.heldout_files=[a]", "data.heldout_files needs data.files"),
        ("--data.seq_len=1", "data.seq_len must be at least 2, got 1"),
        ("--conversion.active_heads=x", "conversion.*active_heads.*x"),
        ("--conversion.allocation=odd", "conversion.*allocation.*'even', 'sensitivity'.*odd"),
        ("--conversion.calibration_tokens=0", "conversion.calibration_tokens must be at least 1, got 0"),
        ("--conversion.calibration_length=[512, 1]", "conversion.calibration_length must be at least 2, got 1"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(file, [override])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(file))


def test_missing_fields_files_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.output_dir"):
        load_recipe(None, ["--model.path=x"])
    with pytest.raises(FileNotFoundError, match=r"no such recipe: nowhere\.yaml"):
        load_recipe("nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: .*line 1") as error:
        load_recipe(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(path: Path) -> None:
    assert load_recipe(path).training.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("recipe", "control"),
    [
        ("smollm2_135m_moh7of9", "smollm2_135m_dense_control"),
        ("llama3_8b_stage2_moh", "llama3_8b_stage2_dense_control"),
    ],
)
def test_the_control_differs_from_the_recipe_in_the_conversion_alone(recipe: str, control: str) -> None:
    moh, control = load_recipe(RECIPES / f"{recipe}.yaml"), load_recipe(RECIPES / f"{control}.yaml")
    assert control.conversion is None
    assert (moh.model, moh.data) == (control.model, control.data)
    ours, theirs = dict(vars(moh.training)), dict(vars(control.training))
    assert ours.pop("output_dir") != theirs.pop("output_dir")
    for training in (ours, theirs):  # a dense model has no routing to balance and nothing to distil
        training.pop("balance_loss_coef"), training.pop("distillation_weight")
    assert ours == theirs


def test_the_stages_for_llama3_read_what_the_paper_says() -> None:
    stages = {name: load_recipe(RECIPES / f"llama3_8b_{name}.yaml") for name in ("stage1_dense", "stage2_moh")}
    for name, tokens, peak, last in (("stage1_dense", 300e9, 6e-5, 6e-6), ("stage2_moh", 100e9, 2e-5, 1e-6)):
        training = stages[name].training
        assert training.max_steps * training.tokens_per_batch == pytest.approx(tokens, rel=1e-4)
        assert (training.learning_rate, training.lr_scheduler_kwargs, training.weight_decay) == (
            peak,
            {"min_lr": last},
            0.1,
        )
        assert stages[name].data.seq_len == 8192
    stage2 = stages["stage2_moh"]
    heads = stage2.conversion
    assert (heads.router, heads.shared_heads, heads.active_heads) == ("query_norm", 16, 8)
    assert (stage2.training.balance_loss_coef, stage2.training.warmup_steps) == (0.01, 50)
    assert stage2.model.path == f"{stages['stage1_dense'].training.output_dir}/model"


EVIL = {"class_path": "evil_module.Evil", "init_args": {"x": 1}}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training.extra", EVIL, "training.extra must be plain data"),
        ("training.extra.optim_args", EVIL, "training.extra.optim_args must be plain data"),
        ("training.extra.optim_args.class_path", "evil_module.Evil", "training.extra.optim_args must be plain data"),
        ("training.lr_scheduler_kwargs", {"a": [EVIL]}, r"training.lr_scheduler_kwargs.a\[0\] must be plain data"),
        (
            "model.from_scratch.extra.rope_parameters",
            EVIL,
            "model.from_scratch.extra.rope_parameters must be plain data",
        ),
        ("training", {"output_dir": "out", **EVIL}, "no field training.class_path"),
        ("conversion", EVIL, "no field conversion.class_path"),
        ("conversion", "evil_module.Evil", "conversion must be a mapping"),
        ("data.sources", [EVIL], r"no field data.sources\[0\].class_path"),
        ("task", "evil_module.Evil", "task must be one of"),
    ],
)
@pytest.mark.parametrize("where", ["file", "override", "config"])
def test_a_recipe_imports_nothing_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, message: str, where: str
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('the recipe ran code')\n")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = {"from_scratch": sizes} if "from_scratch" in field else {"path": "base"}
    data = {"model": model, "training": {"output_dir": "out", "max_steps": 10}}
    *sections, last = field.split(".")
    inner = data if where == "file" else (more := {})
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    overrides = [f"--{field}={json.dumps(value)}"] if where == "override" else []
    if where == "config":
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
        overrides = ["--config", str(tmp_path / "more.yaml")]
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml", overrides)
    assert "evil_module" not in sys.modules


def test_yaml_makes_only_plain_data(file: Path) -> None:
    file.write_text(YAML + "data: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a YAML file: .*python/object/apply"):
        load_recipe(file)
    file.write_text(YAML + "data: {files: &a [*a]}\n")
    with pytest.raises(ValueError, match=r"data\.files"):
        load_recipe(file)
    file.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="a recipe must be a mapping of fields, got list"):
        load_recipe(file)


def test_options_of_a_section_are_added_and_those_of_a_dictionary_replaced(file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("training: {seed: 7, learning_rate: 1e-3}\n")
    options = ["--conversion={active_heads: 2}", "--training.extra={a: 1, b: 2}", "--training.extra={c: 3}"]
    options += ["--training.extra.d.e=.5", "--config", str(tmp_path / "more.yaml"), "--training.seed", "-1"]
    recipe = load_recipe(file, options)
    assert (recipe.conversion.shared_heads, recipe.conversion.active_heads) == (3, 2)
    assert recipe.training.extra == {"c": 3, "d": {"e": 0.5}}
    assert (recipe.training.max_steps, recipe.training.seed, recipe.training.learning_rate) == (10, -1, 1e-3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--training.seed", "--training.seed needs a value"),
        ("training.seed=1", "unrecognized argument 'training.seed'"),
    ],
)
def test_options_that_are_not_written_as_options_are_refused(file: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(file, [option])
