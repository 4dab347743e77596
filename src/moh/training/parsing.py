"""Recipes from plain data: YAML files and options of a command line, checked against the fields of dataclasses.

A recipe may come from someone else, so nothing that it names is imported or called here.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union

from moh._extras import require

_FLOAT = (
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class _Text(str):
    """A value from the command line: text as it is where the field takes text, YAML elsewhere."""


def read_yaml(text: str) -> Any:
    """The value of a YAML text: YAML 1.1 without tags that make objects, except that 1e-4 is a number and dates are text.

    Raises:
        ValueError: it is not YAML; says where, in one line.
    """
    yaml = require("yaml", extra="train")

    class Loader(yaml.SafeLoader):  # type: ignore[misc,name-defined]
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":float", ":timestamp"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+.0123456789"))
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not a YAML file: {' '.join(str(error).split())}") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, or not a mapping; the message begins with the path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such recipe: {path}")
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe must be a mapping of fields, got {type(content).__name__}")
    return content


def split_options(options: Sequence[str]) -> list[tuple[str, str]]:
    """(field, value) of options such as `--training.max_steps 10` or `--training.max_steps=10`, in their order.

    Raises:
        ValueError: an option has no value, or does not begin with two dashes.
    """
    found, rest = [], list(options)
    while rest:
        name, is_whole, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not name[2:]:
            raise ValueError(f"unrecognized argument {name!r}: options are written --field value or --field=value")
        if not is_whole and not rest:
            raise ValueError(f"{name} needs a value")
        found.append((name[2:], value if is_whole else rest.pop(0)))
    return found


def override(kind: Any, data: dict[str, Any], name: str, value: str) -> dict[str, Any]:
    """`data` of a recipe with the field of a dotted name set; of a section, the given fields are set.

    Args:
        kind: the dataclass that `data` describes, None for a dictionary of anything.
        data: plain data.
        name: the field's name, or KEY.NAME in a section or dictionary.
        value: as on a command line.
    """
    first, _, rest = name.partition(".")
    section, before = _section(kind, first), data.get(first)
    before = _read_mapping(before) if isinstance(before, _Text) else before
    known = before if isinstance(before, dict) else {}
    if rest:
        return {**data, first: override(section, known, rest, value)}
    given = _read_mapping(_Text(value)) if section is not None else _Text(value)
    return {**data, first: merge(section, known, given) if isinstance(given, dict) else given}


def merge(kind: Any, data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`data` with the fields of `more`, which win; sections are merged."""
    merged = {**data, **more}
    for name in data.keys() & more.keys():
        section = _section(kind, name)
        if section is not None and isinstance(data[name], dict) and isinstance(more[name], dict):
            merged[name] = merge(section, data[name], more[name])
    return merged


def build(kind: Any, value: Any, name: str = "") -> Any:
    """The value of a field.

    Args:
        kind: its type: a dataclass, `str`, `int`, `float`, `bool`, `Any`, a `Literal`, or a list, dictionary or union of such.
        value: plain data.
        name: the field's, for messages.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; names it.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(parts, value, name)
    if kind is str and isinstance(value, str):
        return str(value)
    if origin is Literal and value in parts:
        return parts[parts.index(value)]
    if isinstance(value, _Text):
        value = _read(value)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, name)
    if kind is Any or (origin is dict and isinstance(value, dict)):
        return _plain(value, name)
    if origin is list and isinstance(value, list):
        return [build(parts[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float, bool) and type(value) is kind:
        return value
    raise ValueError(f"{name} must be {_words(kind)}, got {value!r}")


def _build_union(parts: tuple[Any, ...], value: Any, name: str) -> Any:
    if types.NoneType in parts and (value is None or (isinstance(value, _Text) and value == "null")):
        return None
    parts = tuple(part for part in parts if part is not types.NoneType)
    for part in parts[:-1]:
        try:
            return build(part, value, name)
        except ValueError:
            pass
    try:
        return build(parts[-1], value, name)
    except ValueError:
        if len(parts) == 1:
            raise
    raise ValueError(f"{name} must be {' or '.join(map(_words, parts))}, got {value!r}")


def _build_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping of the fields of a {kind.__name__}, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    within = f"{name}." if name else ""
    for unknown in value:
        if unknown not in fields:
            raise ValueError(f"there is no field {within}{unknown}; there are {', '.join(fields)}")
    hints, given = typing.get_type_hints(kind), {}
    for field in fields.values():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in value:
            given[field.name] = build(hints[field.name], value[field.name], within + field.name)
        elif needed and dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = build(hints[field.name], {}, within + field.name)  # names the field that is missing
        elif needed:
            raise ValueError(f"{within}{field.name} must be given")
    return kind(**given)


def _plain(value: Any, name: str) -> Any:
    """A copy of plain data.

    Raises:
        ValueError: it holds itself, or describes an object: a key `class_path`, by which other tools build any class.
    """
    if isinstance(value, _Text):
        return _plain(_read(value), name)
    if isinstance(value, list):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "class_path" in value:
        raise ValueError(f"{name} must be plain data, but it has a class_path: a recipe makes no objects")
    return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}


def _section(kind: Any, name: str) -> Any:
    """The dataclass of a field, None for any other type."""
    hint = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return next((part for part in (typing.get_args(hint) if union else [hint]) if dataclasses.is_dataclass(part)), None)


def _read(text: str) -> Any:
    """The value that a text of the command line stands for; the text itself if it is not YAML."""
    try:
        return read_yaml(text) if text else ""
    except ValueError:
        return str(text)


def _read_mapping(text: _Text) -> Any:
    """The mapping in a text of the command line; else the text, unread."""
    value = _read(text)
    return value if isinstance(value, dict) else text


def _words(kind: Any) -> str:
    """A type in a message."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    if typing.get_origin(kind) is list:
        return f"a list ({', '.join(_words(part) for part in typing.get_args(kind))} each)"
    return {str: "text (str)", int: "a whole number (int)", float: "a number (float)", bool: "true or false"}.get(
        kind, "a mapping (dict)"
    )
