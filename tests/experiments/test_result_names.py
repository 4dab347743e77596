"""Promise: a page can be made again from committed cells, and states commands that make exactly these."""

from __future__ import annotations

import json

import pytest
from result_names import collect_cells, commands

SAME = {"q": ("options",)}
DEFAULTS = dict(only=None, shares=[3, 2, 1], methods=["a", "b"], lengths=[8])


@pytest.mark.parametrize(
    ("cells", "lines"),
    [
        ([(3, "a", 8), (2, "a", 8), (1, "b", 8), (2, "b", 8), (1, "a", 8), (3, "b", 8)], [""]),
        ([(1, "a", 8), (3, "a", 8)], [" --shares 3 1 --methods a"]),
        ([(3, "a", 8), (2, "a", 8), (3, "b", 8)], [" --shares 3 2 --methods a", " --shares 3 --methods b"]),
        ([(2, "b", 8), (2, "b", 9)], [" --shares 2 --methods b --lengths 8 9"]),
        ([(5, "b", 8), (2, "b", 8)], [" --shares 2 5 --methods b"]),
    ],
    ids=["all", "one_list", "two_calls", "not_a_default", "another_share"],
)
def test_commands_name_every_cell_once(cells, lines) -> None:
    calls = [dict(only="q", shares=[share], methods=[method], lengths=[n]) for share, method, n in cells]
    found = commands("x.py", calls, DEFAULTS)
    assert found == [f"python experiments/x.py --only q{line}" for line in lines]


def test_cells_are_committed_with_those_of_the_work_directory_in_front(tmp_path) -> None:
    work, file = tmp_path / "work", tmp_path / "out" / "page.json"
    work.mkdir()
    assert collect_cells(work, file, SAME) == [] and not file.exists()
    for name, kind in (("b", "q"), ("a", "q"), ("c", "other")):
        (work / f"{name}.json").write_text(json.dumps({"kind": kind, "value": name}))
    (work / "not_a_cell.json").write_text("{}")
    assert [cell["value"] for cell in collect_cells(work, file, SAME)] == ["a", "b"]
    (work / "a.json").write_text(json.dumps({"kind": "q", "value": "new"}))
    (work / "b.json").unlink()
    assert [cell["value"] for cell in collect_cells(work, file, SAME)] == ["new", "b"]
    before = file.read_text()
    assert [cell["value"] for cell in collect_cells(tmp_path / "none", file, SAME)] == ["new", "b"]
    assert file.read_text() == before and len(before.splitlines()) == 4


@pytest.mark.parametrize("model", ["same", "other"])
def test_cells_of_other_options_are_not_joined(tmp_path, model) -> None:
    file = tmp_path / "page.json"
    file.write_text(json.dumps({"a": {"kind": "q", "model": "same", "options": {"tokens": 8}}}))
    before = file.read_text()
    (tmp_path / "work").mkdir()
    cell = {"kind": "q", "model": model, "options": {"tokens": 16}}
    (tmp_path / "work" / "b.json").write_text(json.dumps(cell))
    if model == "other":
        assert len(collect_cells(tmp_path / "work", file, SAME)) == 2
        return
    with pytest.raises(ValueError, match=r"b was measured with options {'tokens': 16}, a with {'tokens': 8}: choose"):
        collect_cells(tmp_path / "work", file, SAME)
    assert file.read_text() == before
