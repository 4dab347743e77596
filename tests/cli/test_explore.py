"""Promises of `moh explore`: an error is reported in one line before the server starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_a_port_that_is_none_is_refused(moh, base_dir: Path) -> None:
    result = moh("explore", base_dir, "--port", "70000")
    assert result.code == 2 and result.err == ["moh explore: --port must be between 1 and 65535, got 70000"]


def test_a_model_that_is_not_there_is_named(moh, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the app extra is not installed")
    result = moh("explore", tmp_path / "lost", "--no-browser")
    assert result.code == 2 and "lost" in result.err[-1]


def test_without_gradio_the_extra_is_named(moh, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "moh.explore.interface", raising=False)
    result = moh("explore", base_dir, "--no-browser")
    assert result.code == 1 and "mixture-of-heads[app]" in result.err[-1]


@pytest.mark.parametrize("options", [(), ("--host", "0.0.0.0", "--port", "8000", "--share", "--no-browser")])
def test_it_is_served_as_asked_and_only_here_by_default(
    moh, base_dir: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    pytest.importorskip("gradio", reason="the app extra is not installed")
    asked: dict[str, object] = {}
    monkeypatch.setattr("moh.explore.interface.serve", lambda app, **how: asked.update(how))
    result = moh("explore", base_dir, *options)
    assert result.code == 0 and any("there is no password" in line for line in result.err) == bool(options)
    if options:
        assert asked == {"host": "0.0.0.0", "port": 8000, "share": True, "browser": False}
    else:
        assert asked == {"host": "127.0.0.1", "port": None, "share": False, "browser": True}
