"""`moh lm-eval` and `moh run`: other programs, in this process, with our models registered.

Transformers' Auto classes, timm and PEFT know our models wherever `moh` is imported (`moh.models.registration`), so running a
program here is all that it takes. A program that starts other Python processes, as `accelerate launch` does, gets them with
`moh` imported too (`SITE`).
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.options import add_command
from moh.models.registration import when_imported
from moh.models.transformers.published import recognise_published_llama

if TYPE_CHECKING:
    from moh.cli.options import Commands

_HARNESS = (
    "Run lm-evaluation-harness by its own command line: moh lm-eval run --model moh --model_args pretrained=DIR ..."
)
_RUN = "Run another Python program with our models registered, such as: moh run trl sft ..., moh run train.py ..."

SITE = Path(__file__).with_name("site")
"""A directory for PYTHONPATH whose `sitecustomize` imports `moh` when a Python process starts."""


def add_harness(sub: Commands) -> None:
    """Add `lm-eval` to the commands."""
    parser = add_command(sub, "lm-eval", _HARNESS, run_harness)
    parser.passes_on = "arguments"
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="of `lm-eval`")


def add_run(sub: Commands) -> None:
    """Add `run` to the commands."""
    parser = add_command(sub, "run", _RUN, run)
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        help="a Python file, a program that a package installs (trl, accelerate), or a module",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="of the program")


def run_harness(arguments: Namespace) -> int:
    from moh._extras import require

    require("lm_eval", extra="eval")
    from lm_eval.__main__ import cli_evaluate

    from moh.evaluation.harness import with_suites

    with _as_program(["lm-eval", *with_suites(arguments.arguments)]):
        return _exit_code(cli_evaluate)


def run(arguments: Namespace) -> int:
    name = arguments.program
    with _as_program([name, *arguments.arguments]):
        if Path(name).is_file() or Path(name, "__main__.py").is_file():
            return _exit_code(lambda: _run_file(name))
        script = _script(name)
        if script is not None:
            return _exit_code(script.load())
        if _is_module(name):
            return _exit_code(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
    raise ValueError(
        f"PROGRAM must be a Python file, a program that an installed package brings, or a module, got {name!r}"
    )


def _run_file(path: str) -> None:
    # Like `python PATH`: files next to it can be imported. run_path does the same for a directory with a __main__.py
    if Path(path).is_file():
        sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _script(name: str) -> EntryPoint | None:
    """The installed program of that name."""
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # a part of a package that is not there; not a name
        return False


def _exit_code(program: Callable[[], Any]) -> int:
    """Call a program, as the scripts that packages install do; returns its exit code. Its errors are shown as Python does."""
    try:
        result = program()
    except SystemExit as stop:
        result = stop.code
    except Exception:
        traceback.print_exc()
        return 1
    if isinstance(result, str):  # sys.exit("message")
        print(result, file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


@contextmanager
def _as_program(argv: Sequence[str]) -> Iterator[None]:
    """Inside the block the process looks like the program's own, and processes that it starts import `moh` too."""
    before, path, inherited = sys.argv, list(sys.path), os.environ.get("PYTHONPATH")
    when_imported("transformers.models.auto.configuration_auto", recognise_published_llama)
    sys.argv = list(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *([inherited] if inherited else [])])
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited
