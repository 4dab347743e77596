"""Recipes of the package are found by name, files by path; `moh train --list` lists the names."""

from __future__ import annotations

from pathlib import Path

import pytest

from moh.cli import main
from moh.training import shipped
from moh.training.recipes import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param("llm/tiny_75", "llm/moh_llm_tiny_75.yaml", id="short"),
        pytest.param("llm/moh_llm_tiny_75", "llm/moh_llm_tiny_75.yaml", id="the-file's-name"),
        pytest.param("llm/tiny", "llm/tiny.yaml", id="a-name-that-others-begin-with"),
        pytest.param("vit/b_75_paper", "vit/moh_vit_b_75_paper.yaml", id="vit"),
        pytest.param("dit/fashion_mnist", "dit/fashion_mnist.yaml", id="dit"),
    ],
)
def test_a_recipe_is_found_by_its_name(name: str, file: str) -> None:
    assert shipped.find_recipe(name) == RECIPES / file
    assert load_recipe(name) == load_recipe(RECIPES / file)


def test_every_recipe_has_one_name_and_a_line_about_it() -> None:
    files = {file for folder in shipped.FAMILIES for file in (RECIPES / folder).glob("*.yaml")}
    assert set(shipped.shipped_recipes().values()) == files and len(shipped.shipped_recipes()) == len(files)
    for file in files:
        assert file.read_text(encoding="utf-8").startswith("# ") and len(shipped.about(file)) > 20


def test_a_file_of_this_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llm").mkdir()
    Path("llm/tiny").write_text("training: {output_dir: mine, max_steps: 3}\nmodel: {path: base}\n")
    assert load_recipe("llm/tiny").training.output_dir == "mine"


def test_config_takes_a_name_too() -> None:
    recipe = load_recipe("llm/tiny", ["--config", "llm/tiny", "--training.max_steps", "7"])
    assert recipe.training.max_steps == 7


@pytest.mark.parametrize("name", ["llm/tiny_57", "lm/tiny_75", "tiny_75"])
def test_a_wrong_name_says_what_is_similar(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such recipe: .* did you mean .*tiny_75.*moh train --list"):
        load_recipe(name)


def test_the_package_s_own_copy_comes_before_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moh" / "recipes" / "llm").mkdir(parents=True)
    monkeypatch.setattr(shipped.moh, "__file__", str(tmp_path / "moh" / "__init__.py"))
    assert shipped.recipes_directory() == tmp_path / "moh" / "recipes"


def test_an_installation_without_recipes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped.moh, "__file__", str(tmp_path / "lib" / "moh" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no recipes"):
        shipped.recipes_directory()


def test_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(shipped.shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines) and str(RECIPES) in lines[-1]


def test_train_without_a_recipe_names_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "moh train --list" in capsys.readouterr().err
