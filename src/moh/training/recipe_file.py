"""Recipes as YAML files with overrides from the command line; `task` names the family, whose dataclasses define the fields."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh._extras import require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

TASKS = {
    "language": ("moh.training.recipe", "Recipe"),
    "image_classification": ("moh.training.images.recipe", "ImageRecipe"),
    "diffusion": ("moh.training.diffusion.recipe", "DiffusionRecipe"),
}
"""task -> (module, dataclass) of its recipes. A recipe without `task` is a language model's."""


def recipe_parser(recipe_class: type, prog: str | None = None) -> ArgumentParser:
    """The parser of recipes: `--config FILE` and one option for every field, such as `--training.max_steps 10`."""
    jsonargparse = require("jsonargparse", extra="llm")
    parser: ArgumentParser = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Options override the recipe in the YAML file.",
    )
    parser.add_argument("--config", action="config", help="YAML file with a recipe; may be given more than once")
    parser.add_class_arguments(recipe_class)
    return parser


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Read a recipe from a YAML file and apply overrides.

    Args:
        path: the YAML file; None if the overrides give everything.
        overrides: as on a command line: `["--training.max_steps", "10", "--conversion", "null"]`.

    Returns:
        the recipe, of its task's class (`TASKS`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown, missing or wrong field; one line that names it.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"no such recipe: {path}")
    jsonargparse = require("jsonargparse", extra="llm")
    module, name = TASKS[_task(path, overrides)]
    recipe_class = getattr(importlib.import_module(module), name)
    parser = recipe_parser(recipe_class)
    arguments = ([] if path is None else ["--config", str(path)]) + list(overrides)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        return recipe_class(**{f.name: parsed[f.name] for f in dataclasses.fields(recipe_class)})
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{path or 'recipe'}: {_one_line(str(error))}") from None


def dump_recipe(recipe: Any) -> str:
    """The recipe as YAML that `load_recipe` reads."""
    yaml = require("yaml", extra="llm")
    return str(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))


def _task(path: str | Path | None, overrides: Sequence[str]) -> str:
    """The task from the overrides (`--task=NAME` or `--task NAME`), else from the file, else "language"."""
    yaml = require("yaml", extra="llm")
    task: object = "language"
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
        task = content.get("task", task) if isinstance(content, dict) else task
    for index, override in enumerate(overrides):
        if override.startswith("--task="):
            task = override.removeprefix("--task=")
        elif override == "--task" and index + 1 < len(overrides):
            task = overrides[index + 1]
    if task not in TASKS:
        raise ValueError(f"{path or 'recipe'}: task must be one of {', '.join(TASKS)}, got {task!r}")
    return str(task)


def _one_line(text: str) -> str:
    """The parser's message, without its report on every alternative of an optional part."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "- Problem with",
        "- Expected a <class 'NoneType'>",
        "Given value",
    )
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(" ".join(line for line in lines if not line.startswith(noise)).split())
