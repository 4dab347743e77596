"""Tables as CSV files. Not for what stands in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from moh._files import write_text


def save_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same columns as CSV, whole or not at all.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(Path(path), text.getvalue())
