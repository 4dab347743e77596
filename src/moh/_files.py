"""Files that appear whole or not at all; for directories see `moh.training.checkpoints`."""

from __future__ import annotations

import os
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
