"""Tables as CSV and parquet files and as data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moh._extras import require
from moh._files import replacing_file, write_text

if TYPE_CHECKING:
    from pandas import DataFrame


Row = dict[str, int | float | str]


def save_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same columns as CSV, whole or not at all.

    Raises:
        ValueError: there are no rows.
    """
    _check(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(Path(path), text.getvalue())


def save_parquet(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same columns as parquet (extra `plot`), whole or not at all.

    Raises:
        ValueError: there are no rows.
    """
    _check(rows)
    frame = to_pandas(rows)
    with replacing_file(Path(path)) as file:
        frame.to_parquet(file, index=False)


def to_pandas(rows: Sequence[Mapping[str, object]]) -> DataFrame:
    """Rows as a data frame (extra `plot`)."""
    frame: DataFrame = require("pandas", extra="plot").DataFrame(list(rows))
    return frame


def _check(rows: Sequence[Mapping[str, object]]) -> None:
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
