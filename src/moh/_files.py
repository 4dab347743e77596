"""Files and directories that appear whole or not at all, and early checks that they can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file written there replaces `path` if the block succeeds."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        file = Path(scratch) / path.name
        yield file
        os.replace(file, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under a temporary name next to `path`, then move it into place."""
    with replacing_file(path) as file:
        file.write_text(text, encoding="utf-8")


def check_writable(directory: str | Path, *, name: str) -> None:
    """Check that files can be created in `directory` or its nearest existing parent; leaves nothing behind.

    Raises:
        ValueError: the directory can't be written; the message begins with `name`.
    """
    existing = Path(directory).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{name} {directory} can't be written: {error.strerror} ({existing})") from None


def check_replaceable(directory: str | Path, *, name: str, holding: str = "config.json") -> None:
    """Check that `directory` may be created or replaced: it is missing, empty, or holds a model (the file `holding`).

    Raises:
        ValueError: the directory holds something else, or can't be written; the message begins with `name`.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} {directory} must be a directory, but it is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / holding).is_file():
        raise ValueError(
            f"{name} {directory} must be new, empty or a model's directory; it holds other files, which are kept"
        )
    check_writable(target.parent if target.exists() else target, name=name)


@contextmanager
def replacing_directory(target: Path, *, writes: bool = True, holding: str = "config.json") -> Iterator[Path]:
    """Yield a directory next to `target` that replaces it if the block succeeds, and is deleted if it fails.

    Args:
        target: the directory to create or replace.
        writes: False on the processes of a distributed run that only take part in gathering: they move nothing.
        holding: the file that marks a directory as replaceable.
    """
    target = target.resolve()
    if writes:
        check_replaceable(target, name="output directory", holding=holding)
    scratch = target.with_name(f".{target.name}.partial")  # the same name on every process
    if writes:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        if writes:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not writes:
        return
    if target.exists():
        old = target.with_name(f".{target.name}.old")  # os.replace can't replace a directory that has files
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(scratch, target)
        shutil.rmtree(old)
    else:
        os.replace(scratch, target)
