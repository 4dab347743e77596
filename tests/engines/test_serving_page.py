"""The table of docs/serving.md: every engine that works has a test, with the versions that `make test-engines` installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines_on_cpu import ENGINES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
HEADER, _, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE[PAGE.index("| engine |") :].split("\n\n")[0].splitlines()
]


@pytest.mark.parametrize("row", [pytest.param(dict(zip(HEADER, row, strict=True)), id=row[0]) for row in ROWS])
def test_an_engine_that_works_has_a_test(row: dict[str, str]) -> None:
    if row["works"].startswith("no"):  # no, or not run
        assert row["test"] == "–"
    else:
        assert (ROOT / row["test"].strip("`")).is_file()


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_one_row_with_the_version_and_the_test_that_are_run(name: str) -> None:
    pins = [re.fullmatch(r"(.+)==(.+)", package) for package in ENGINES[name].packages]
    versions = {" ".join(pin.groups()) for pin in pins if pin}
    rows = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    (row,) = [row for row in rows if versions & set(row["tested with"].split(", "))]
    assert row["test"].strip("`") == ENGINES[name].tests[0] and (ROOT / ENGINES[name].tests[0]).is_file()
    assert name in row["command"]
