"""Promises of `make test-engines`: an engine that it has installed and that can't be imported fails, elsewhere its tests are
skipped; and each environment's tests get the options, and a line of the report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import environments
from engines_on_cpu import PROMISED, needs
from environments import Environment


@pytest.mark.parametrize(
    ("promised", "error"), [("onnx", ModuleNotFoundError), ("vllm", pytest.skip.Exception), ("", pytest.skip.Exception)]
)
def test_only_a_promised_engine_must_be_there(
    monkeypatch: pytest.MonkeyPatch, promised: str, error: type[BaseException]
) -> None:
    monkeypatch.setenv(PROMISED, promised)
    with pytest.raises(error, match="no_such_module"):
        needs("onnx", ["json", "no_such_module"])


@pytest.mark.parametrize(("codes", "failed", "report"), [((0, 0), 0, "passed"), ((1, 0), 1, "FAILED")])
def test_each_environment_gets_the_options_and_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    codes: tuple[int, ...],
    failed: int,
    report: str,
) -> None:
    made = {
        "a": Environment(Path("python-a"), ("tests/a.py",), paths=(Path("p"), Path("q")), variables={PROMISED: "a"}),
        "b": Environment(Path("python-b"), ("tests/b.py",), holds="torch 2"),
    }
    ran = []
    left = iter(codes)

    def fake(command: list[object], *, env: dict[str, str], **options: object) -> SimpleNamespace:
        ran.append((command, env))
        return SimpleNamespace(returncode=next(left))

    monkeypatch.setattr(environments.subprocess, "run", fake)
    given = ["--only", "a", "b", "--environments", str(tmp_path), "--", "-k", "linear"]
    monkeypatch.setattr(sys, "argv", ["file.py", *given])
    found = environments.run("what it does", ("a", "b", "c"), lambda name, directory: made[directory.name])
    assert found == failed
    assert [command for command, _ in ran] == [
        [Path(f"python-{name}"), "-m", "pytest", f"tests/{name}.py", "-k", "linear"] for name in "ab"
    ]
    assert ran[0][1]["PYTHONPATH"] == f"p{os.pathsep}q" and ran[0][1][PROMISED] == "a"
    assert capsys.readouterr().out.splitlines() == [f"a: {report}", "b: passed with torch 2"]
