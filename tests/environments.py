"""Run tests in environments of their own, one after the other: the command line of `engines_on_cpu.py` and `versions.py`."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """An environment that is ready, and what pytest gets there.

    Attributes:
        python: its interpreter.
        tests: arguments of pytest.
        paths: where modules are found besides installed ones.
        variables: environment variables, added to the present ones.
        holds: what the report says of it.
    """

    python: Path
    tests: Sequence[str]
    paths: Sequence[Path] = (ROOT / "src", ROOT)
    variables: Mapping[str, str] = field(default_factory=dict)
    holds: str = ""


def run(description: str | None, names: Collection[str], make: Callable[[str, Path], Environment]) -> int:
    """Parse the options, and run the tests in each environment; 1 if any of them failed, else 0.

    Args:
        description: for `--help`.
        names: of the environments.
        make: (name, directory) -> the environment, installed in that directory.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=[*names], help="instead of all of them")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-versions", help="directory that holds them")
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    arguments = parser.parse_args()
    report, failed = [], False
    for name in arguments.only:
        made = make(name, arguments.environments / name)
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, made.paths))} | made.variables
        command = [made.python, "-m", "pytest", *made.tests, *arguments.options]
        code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
        failed |= code != 0
        held = f" with {made.holds}" if made.holds else ""
        report.append(f"{name}: {'FAILED' if code else 'passed'}{held}")
    print(*report, sep="\n")
    return int(failed)
