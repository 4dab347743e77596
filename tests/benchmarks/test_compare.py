"""Comparing two commits: real checkouts, made-up figures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.compare import compare, compared
from benchmarks.results import Run
from benchmarks.tables import OLDER, subject_table
from tests.benchmarks.test_benchmark_runs import CASES, MACHINE, result

FAKE = """
import pathlib, shutil, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
output.mkdir(parents=True)
shutil.copy(pathlib.Path(__file__).parent / "figures.json", output / "cpu.json")
"""


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *words], cwd=root, check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A commit with half of the heads at 0.5 of dense, and a working tree with 0.4."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE)
    Run(MACHINE, [result(CASES[0], 0.5, 0.9)]).save(package / "figures.json")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "base")
    Run(MACHINE, [result(CASES[0], 0.4, 0.9)]).save(package / "figures.json")
    return tmp_path


def test_the_base_runs_its_own_code_and_leaves_no_worktree(repository: Path) -> None:
    rows, summary = compare(repository, "HEAD", ["core"], ["--quick"])
    assert [row[1:] for row in rows.rows] == [
        ("ours, 50%", "0.500 (0.490 to 0.510)", "0.400 (0.390 to 0.410)", "0.800 *"),
        ("ours, 100%", "0.900 (0.890 to 0.910)", "0.900 (0.890 to 0.910)", "1.000"),
    ]
    assert summary.rows == (("Attention alone", "2", "0.900 (0.850 to 0.950)", "1", "0"),)
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(worktrees.stdout.splitlines()) == 1


def test_an_unknown_commit_is_named(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"--compare must be a commit.*got 'nowhere'"):
        compare(repository, "nowhere", ["core"], [])


def test_benchmarks_that_fail_are_reported(repository: Path) -> None:
    (repository / "benchmarks" / "__main__.py").write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match="exit code 2"):
        compare(repository, "HEAD", ["core"], [])


def test_cases_that_only_one_commit_has_are_left_out() -> None:
    both = Run(MACHINE, [result(CASES[0], 0.5)])
    tables = compared([both], [Run(MACHINE, [result(CASES[0], 0.6), result(CASES[1], 0.5)])])
    assert [row[0] for row in tables[0].rows] == [CASES[0].key]
    assert tables[-1].rows[0][3:] == ("0", "1")


def test_rows_older_than_the_kernels_are_marked() -> None:
    run = Run(MACHINE, [result(CASES[0], 0.5)])
    for kernels, mark in (("2024-12-31T00:00:00", ""), ("2025-02-01T00:00:00", OLDER), ("", "")):
        table = subject_table("core", [run], kernels)
        assert table is not None
        assert table.rows[0][1] == "A" + mark


def test_moves_and_renames_do_not_count_as_changes_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = (Path(results.__file__).parents[1] / ".git-blame-ignore-revs").read_text().split()
    answers = {"status": "", "log": f"{ignored[-1]} 2000\n{'a' * 40} 1000\n"}
    monkeypatch.setattr(results, "_git", lambda root, word, *words: answers[word])
    assert results.kernels_changed() == "1970-01-01T00:16:40+00:00"
    answers["log"] = ""
    assert results.kernels_changed() == ""
