"""Promise: `moh train --help` lists every field of a recipe, with its type and default, from the dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

import pytest

from moh.training.fields import fields_of
from moh.training.recipes import TASKS

RECIPES = Path(__file__).parents[2] / "recipes"


def fields(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields that a command line can set."""
    found = []
    for field in dataclasses.fields(kind):
        found.append(prefix + field.name)
        hint = typing.get_type_hints(kind)[field.name]
        parts = [] if typing.get_origin(hint) is list else [hint, *typing.get_args(hint)]
        found += [n for part in parts if dataclasses.is_dataclass(part) for n in fields(part, f"{prefix}{field.name}.")]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_field_of_a_task_is_listed(task: str) -> None:
    module, name = TASKS[task]
    told = {line.split(":")[0].strip() for line in fields_of(["--task", task]).splitlines()}
    assert set(fields(getattr(importlib.import_module(module), name))) <= told


def test_types_defaults_and_meanings_are_given() -> None:
    text = fields_of([])
    for line in (
        "training.max_steps: int (must be given)",
        "training.learning_rate: float = 0.0001",
        "training.precision: auto or bf16 or fp16 or tf32 or fp32 = auto",
        "training.gradient_checkpointing: true or false = false",
        "model.path: text or null = null",
        "data.files: list of text = []",
        "data.sources: list of mapping = []",
        "training.extra: mapping = {}",
    ):
        assert f"    {line}\n" in text
    assert "optimiser steps." in text and "weight beta of the load-balance loss" in text  # of a base class


@pytest.mark.parametrize(
    ("recipe", "task"), [("llm", "language"), ("vit", "image_classification"), ("dit", "diffusion")]
)
def test_a_recipes_own_fields_are_listed(moh, recipe: str, task: str) -> None:
    file = sorted((RECIPES / recipe).glob("*.yaml"))[0]
    for name in (file, f"{recipe}/{file.stem}"):
        result = moh("train", name, "--help")
        assert result.code == 0 and any(f"task: {task}" in line for line in result.out)


@pytest.mark.parametrize("words", [["nowhere.yaml"], ["--task", "nonsense"]])
def test_help_comes_whatever_the_other_words_are(moh, words: list[str]) -> None:
    result = moh("train", *words, "--help")
    assert result.code == 0 and result.out[0].startswith("usage: moh train")
