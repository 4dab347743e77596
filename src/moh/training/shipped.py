"""The recipes that come with the package, found by name: "llm/tiny_75" is `recipes/llm/moh_llm_tiny_75.yaml`.

They are in the wheel as `moh/recipes`; a checkout has them in its root.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import moh

FAMILIES = ("llm", "vit", "dit")
"""Folders of recipes; `accelerate` has configurations of its launcher."""


def find_recipe(path_or_name: str | Path) -> Path:
    """A recipe's file: of this path if there is one, otherwise the shipped one of this name.

    Raises:
        FileNotFoundError: neither; lists names that are similar.
    """
    path, name = Path(path_or_name), str(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    folder, _, stem = name.partition("/")
    for known in (name, f"{folder}/{stem.removeprefix(f'moh_{folder}_')}"):
        if known in shipped:
            return shipped[known]
    similar = difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(similar)}? " if similar else ""
    raise FileNotFoundError(f"no such recipe: {name}: not a file, nor a recipe of this package; {hint}"
                            "`moh train --list` lists those")  # fmt: skip


@cache
def shipped_recipes() -> Mapping[str, Path]:
    """Name -> file, sorted; a name is FOLDER/FILE without `moh_FOLDER_` and without `.yaml`."""
    root = recipes_directory()
    found = {}
    for folder in FAMILIES:
        for file in sorted((root / folder).glob("*.yaml")):
            found[f"{folder}/{file.stem.removeprefix(f'moh_{folder}_')}"] = file
    return found


def recipes_directory() -> Path:
    """Where the recipes lie, with the configurations for `accelerate launch` next to them.

    Raises:
        FileNotFoundError: the installation has none.
    """
    package = Path(moh.__file__).parent
    for place in (package / "recipes", package.parents[1] / "recipes"):
        if (place / FAMILIES[0]).is_dir():
            return place
    raise FileNotFoundError(f"this installation of moh has no recipes in {package / 'recipes'}; install it again")


def about(file: Path) -> str:
    """What a recipe is for: the first line of its file, a comment."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").strip()
