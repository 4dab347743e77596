"""The name of an experiment's result files, the commands that made them, and the cells that a page is made of.

Results under the default name are committed, so a run with other options must have a name of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moh._files import write_text


def results_name(
    parser: argparse.ArgumentParser, options: argparse.Namespace, fields: Iterable[str], *, default: str
) -> str:
    """`--name`, or `default` if it is not given and all `fields` have their default values; otherwise the parser exits.

    Args:
        parser: it has an option `--name` without a default.
        options: as parsed.
        fields: the options that change results.
        default: the name of the committed results.
    """
    if options.name is not None:
        return str(options.name)
    changed = [_flag(field) for field in fields if getattr(options, field) != parser.get_default(field)]
    if changed:
        parser.error(
            f"--name must be given with {', '.join(changed)}: without it, the results would replace those of the default "
            f"options in {default}.*"
        )
    return default


def command(script: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command line of an experiment, with those of its options that differ from their defaults; True is a flag."""
    words = ["python", f"experiments/{script}"]
    for field, value in values.items():
        if value != defaults[field]:
            given = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [_flag(field), *map(_word, given)]
    return shlex.join(words)


def collect_cells(work: Path, committed: Path, same: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """All cells of an experiment; those in `work` are added to the committed ones, or replace them.

    Args:
        work: directory with one JSON file per cell.
        committed: the file next to the page, by cell; it is written again where `work` has some.
        same: kinds of cells that belong to the experiment -> the fields that all of one model must have in common.

    Raises:
        ValueError: they have not, so that no page could compare them; nothing is written.
    """
    cells = json.loads(committed.read_text("utf-8")) if committed.is_file() else {}
    measured = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(work.glob("*.json"))}
    if new := {name: cell for name, cell in measured.items() if cell.get("kind") in same}:
        cells = dict(sorted((cells | new).items()))
        _check_comparable(cells, new, same)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in cells.items())
        committed.parent.mkdir(parents=True, exist_ok=True)
        write_text(committed, f"{{\n{lines}\n}}\n")
    return list(cells.values())


def _check_comparable(
    cells: Mapping[str, dict[str, Any]], new: Mapping[str, dict[str, Any]], same: Mapping[str, Sequence[str]]
) -> None:
    for name, cell in new.items():
        for other_name, other in cells.items():
            if (cell["kind"], cell.get("model")) != (other["kind"], other.get("model")):
                continue
            for field in same[cell["kind"]]:
                if cell.get(field) != other.get(field):
                    raise ValueError(
                        f"{name} was measured with {field} {cell.get(field)}, {other_name} with {other.get(field)}: choose "
                        "another --out, or remove the cells that were measured with other options"
                    )


def commands(script: str, calls: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[str]:
    """The fewest command lines that make what all these calls make together.

    Args:
        script: of the experiment.
        calls: values of its options; those of one cell each are enough, as lists of one value. Calls that differ in one list
            alone are joined; a tuple is a value of its own.
        defaults: of all options in `calls`.
    """
    found = list(calls)
    for field in [name for name in defaults if isinstance(defaults[name], list)]:
        groups: dict[str, dict[str, Any]] = {}
        for call in found:
            rest = json.dumps({name: value for name, value in call.items() if name != field})
            group = groups.setdefault(rest, {**call, field: []})
            group[field] += [value for value in call[field] if value not in group[field]]
        found = list(groups.values())
        order = defaults[field]
        for call in found:  # those of one set in one order, which the next field is compared by
            call[field].sort(key=lambda value: (order.index(value) if value in order else len(order), str(value)))
    return [command(script, call, defaults) for call in found]


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
