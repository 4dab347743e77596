"""What a change did to the figures: the same cases measured with the code of another commit and with this one, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

from benchmarks.results import Run
from benchmarks.tables import SUBJECTS, Table
from benchmarks.timing import Row

ROUNDS = 2
"""How often each code measures a subject; the order turns around in between, so that a drift affects both."""


def compare(root: Path, base: str, subjects: Sequence[str], arguments: Sequence[str]) -> list[Table]:
    """Measure subjects with the commit `base` and with the working tree of `root`; one table per subject, then a summary.

    Args:
        root: of the repository.
        base: a commit, branch or tag.
        subjects: names of `runner.SUBJECTS`.
        arguments: further options of `python -m benchmarks`, the same for both.

    Raises:
        ValueError: git does not know `base`, or the benchmarks of one of the two failed.
    """
    runs: dict[str, list[Run]] = {"base": [], "new": []}
    with _checked_out(root, base) as other, tempfile.TemporaryDirectory() as outputs:
        for subject in subjects:
            for turn in range(ROUNDS):
                for name in ("base", "new") if turn % 2 == 0 else ("new", "base"):
                    output = Path(outputs, f"{subject}-{turn}-{name}")
                    print(f"{subject}, {name}, {turn + 1} of {ROUNDS}", file=sys.stderr)
                    runs[name].append(_measured(other if name == "base" else root, [subject, *arguments], output))
    return compared(runs["base"], runs["new"])


def compared(base: Sequence[Run], new: Sequence[Run]) -> list[Table]:
    """The rows that both have: ratio to dense before and after with their quartiles, and after / before."""
    before, after = _by_row(base), _by_row(new)
    found: dict[str, list[tuple[tuple[str, ...], float, bool]]] = {}
    for key in after:
        if key in before and key[2] != "dense":
            (low, middle, high), (new_low, new_middle, new_high) = _spread(before[key]), _spread(after[key])
            outside = new_low > high or new_high < low
            cells = (
                key[1],
                key[2] if key[3] is None else f"{key[2]}, {key[3]:.0%}",
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                f"{new_middle:.3f} ({new_low:.3f} to {new_high:.3f})",
                f"{new_middle / middle:.3f}" + (" *" if outside else ""),
            )
            found.setdefault(key[0], []).append((cells, new_middle / middle, outside))
    header = ("case", "contender", "before, ratio to dense", "after", "after / before (*: quartiles apart)")
    tables = [Table(SUBJECTS[name], header, tuple(cells for cells, _, _ in rows)) for name, rows in found.items()]
    summary = Table(
        "Summary",
        ("subject", "rows", "after / before, median (quartiles)", "faster outside of the spread", "slower"),
        tuple(_summary(name, [(ratio, outside) for _, ratio, outside in rows]) for name, rows in found.items()),
    )
    return [*tables, summary]


def _summary(subject: str, rows: Sequence[tuple[float, bool]]) -> tuple[str, ...]:
    ratios = [ratio for ratio, _ in rows]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    apart = [ratio for ratio, outside in rows if outside]
    faster = sum(ratio < 1 for ratio in apart)
    spread = f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"
    return SUBJECTS[subject], str(len(rows)), spread, str(faster), str(len(apart) - faster)


def _by_row(runs: Sequence[Run]) -> dict[tuple[str, str, str, float | None], list[Row]]:
    """(subject, case, contender, share) -> its row in each run."""
    found: dict[tuple[str, str, str, float | None], list[Row]] = {}
    for run in runs:
        for result in run.results:
            for row in result.rows:
                found.setdefault((result.case.subject, result.case.key, row.contender, row.share), []).append(row)
    return found


def _spread(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Lowest lower quartile, median of the medians, highest upper quartile."""
    return min(r.ratio_low for r in rows), median(r.ratio for r in rows), max(r.ratio_high for r in rows)


@contextmanager
def _checked_out(root: Path, base: str) -> Iterator[Path]:
    """A temporary worktree of the commit."""
    with tempfile.TemporaryDirectory() as parent:
        tree = Path(parent, "base")
        done = _git(root, "worktree", "add", "--detach", str(tree), f"{base}^{{commit}}")
        if done.returncode:
            raise ValueError(
                f"--compare must be a commit, branch or tag of this repository, got {base!r}: {done.stderr}"
            )
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)


def _measured(tree: Path, words: Sequence[str], output: Path) -> Run:
    """Run the benchmarks of a tree with that tree's own package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tree / "src"), str(tree)))}
    command = [sys.executable, "-m", "benchmarks", *words, "--output-dir", str(output)]
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=False)
    files = list(output.glob("*.json"))
    if done.returncode or len(files) != 1:
        raise ValueError(f"the benchmarks of {tree} ended with exit code {done.returncode}: {' '.join(command)}")
    return Run.load(files[0])
