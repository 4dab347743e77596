"""The name of an experiment's result files, and the command that made them.

Results under the default name are committed, so a run with other options must have a name of its own.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from typing import Any


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
    """The command line of an experiment, with those of its options that differ from their defaults."""
    words = ["python", f"experiments/{script}"]
    for field, value in values.items():
        if value != defaults[field]:
            words += [_flag(field), *map(_word, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
