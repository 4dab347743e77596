"""The fields of a recipe as text for `moh train --help`, from the dataclasses themselves: name, type, default, meaning."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union

from moh.training.parsing import read_file, split_options
from moh.training.recipes import TASKS, recipe_class
from moh.training.shipped import find_recipe

_WIDTH = 100


def fields_of(words: Sequence[str]) -> str:
    """The fields of the recipe that a command line names, or, without one, of a language model's.

    Args:
        words: those after `moh train`; the first may be a recipe's file or name, and `--task` may be among them.
    """
    recipe = words[0] if words and not words[0].startswith("-") else None
    given = [f"--task={next_word}" for word, next_word in itertools.pairwise(words) if word == "--task"]
    options = split_options([*given, *(word for word in words if word.startswith("--task="))])
    kind = recipe_class(read_file(find_recipe(recipe)) if recipe is not None else {}, options)
    task = next(task for task, (_, name) in TASKS.items() if name == kind.__name__)
    others = [other for other in TASKS if other != task]
    return "\n".join(
        (
            f"fields of a recipe with `task: {task}`, in the file or as --NAME VALUE:",
            *_lines(kind, "", 1),
            "",
            *textwrap.wrap(
                f"For those of {' and '.join(others)}: moh train --task {others[0]} --help, or moh train RECIPE --help.",
                _WIDTH,
            ),
        )
    )


def _lines(kind: Any, prefix: str, level: int) -> Iterator[str]:
    meanings, hints = _meanings(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, indent = hints[field.name], "  " * level
        yield f"{indent}{prefix}{field.name}: {_type(hint)}{_default(field)}"
        if field.name in meanings:
            yield from textwrap.wrap(
                meanings[field.name], _WIDTH, initial_indent=indent + "    ", subsequent_indent=indent + "    "
            )
        for part in _dataclasses(hint):
            # The parts of a list have no name of their own on a command line
            name = f"{prefix}{field.name}." if typing.get_origin(hint) is not list else ""
            yield from _lines(part, name, level + 1)


def _meanings(kind: type) -> dict[str, str]:
    """Field -> what the docstrings of a dataclass and its bases say of it (`name: text` below "Args:")."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")[2]
        text = textwrap.dedent(re.split(r"\n\n\S", text)[0])
        for entry in re.split(r"\n(?=\S)", text):
            names, colon, meaning = entry.partition(": ")
            if colon:
                found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def _type(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is list:
        return f"list of {_type(parts[0])}"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "mapping"
    return {types.NoneType: "null", str: "text", bool: "true or false", Any: "anything"}.get(hint) or hint.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if dataclasses.is_dataclass(value):
            return ""  # each of its fields has its own
    if value is dataclasses.MISSING:
        return " (must be given)"
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f" = {value}"


def _dataclasses(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [part for argument in typing.get_args(hint) for part in _dataclasses(argument)]
