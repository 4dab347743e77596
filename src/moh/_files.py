"""Text files that appear whole or not at all. Not for directories (`moh.training.checkpoints`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under a temporary name beside `path`, then move it into place."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        file = Path(scratch) / path.name
        file.write_text(text, encoding="utf-8")
        os.replace(file, path)
