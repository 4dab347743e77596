"""A converted model on disk, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moh.cli import main


@dataclass
class Result:
    """What a command left: its exit code, and its lines on standard output and error."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def moh(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`moh("eval", model, ...)`: run a command; SystemExit, as argparse raises it, becomes its code."""
    from transformers.utils import logging

    # As in a process of its own whose standard error is no terminal; transformers is imported already here
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable_progress_bar()

    def run(*argv: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out.splitlines(), err.splitlines())

    yield run
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def moh_dir(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama converted by the command line, one shared head and one routed."""
    target = tmp_path_factory.mktemp("converted") / "model"
    heads = ["--shared-heads", "1", "--active-heads", "1"]
    options = ["--files", str(text_file), "--calibration-tokens", "1024"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        assert main(["convert", str(base_dir), str(target), *heads, *options]) == 0
    return target
