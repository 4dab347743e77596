"""Promise: the table has the paper's cases, with our ratio and the paper's in their places."""

from __future__ import annotations

from benchmarks.cases import Contender
from benchmarks.table_7 import PAPER, SHARES, ours, table
from benchmarks.timing import Row


def test_each_ratio_stands_with_its_length_and_share() -> None:
    def measured(share: float, ratio: float) -> Row:
        return Row("ours", share, share, 1.0, 1.0, 1.0, ratio, ratio - 0.01, ratio + 0.01, 5)

    found = {
        length: [Row("dense", None, None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5), *(measured(s, s / 2) for s in SHARES)]
        for length in PAPER
    }
    lines = table(found, "a CPU")
    assert "| 256 | 90% | 0.45 (0.44 to 0.46) | 0.98 |" in lines
    assert "| 512 | 50% | 0.25 (0.24 to 0.26) | 0.63 |" in lines and len(lines) == 4 + 6


def test_only_dense_attention_and_ours_are_timed() -> None:
    every = [Contender(name, lambda: None, 0.5) for name in ("dense", "masked", "ours", "ours (sdpa)", "ideal")]
    assert [contender.name for contender in ours(every)] == ["dense", "ours"]
