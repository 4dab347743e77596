"""Promise: files are fetched in environments without pip too, by whichever pip can be run without installing one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moh.data import fetch


def environment(monkeypatch: pytest.MonkeyPatch, *, uv: str | None, ensurepip: Path | None) -> None:
    """Makes this look like an environment without pip."""
    found = importlib.util.find_spec
    spec = None if ensurepip is None else ModuleSpec("ensurepip", None, origin=str(ensurepip / "__init__.py"))
    special = {"pip": None, "ensurepip": spec}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: special[name] if name in special else found(name))
    monkeypatch.setattr(fetch.shutil, "which", lambda name: uv if name == "uv" else None)


def test_the_environments_own_pip_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    assert fetch._pip() == [sys.executable, "-m", "pip"]


def test_then_the_one_that_comes_with_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_bundled").mkdir()
    (tmp_path / "_bundled" / "pip-24.0-py3-none-any.whl").touch()
    environment(monkeypatch, uv="/bin/uv", ensurepip=tmp_path)
    assert fetch._pip() == [sys.executable, str(tmp_path / "_bundled" / "pip-24.0-py3-none-any.whl" / "pip")]


def test_then_uvs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, uv="/bin/uv", ensurepip=tmp_path)  # Debian's ensurepip has no wheels
    assert fetch._pip()[:3] == ["/bin/uv", "tool", "run"] and fetch._pip()[-1] == "pip"


def test_else_one_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, uv=None, ensurepip=None)
    with pytest.raises(RuntimeError, match=r"has no pip to fetch files with: run `.* -m ensurepip`"):
        fetch._pip()


def test_a_bundled_pip_runs_without_being_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or not list(Path(str(spec.origin)).parent.glob("_bundled/pip-*.whl")):
        pytest.skip("this Python comes without pip's wheel")
    environment(monkeypatch, uv=None, ensurepip=Path(str(spec.origin)).parent)
    result = subprocess.run([*fetch._pip(), "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0 and ".whl" in result.stdout
