"""The paper's table 7 with our kernels: attention of 32 heads of 64 at 90, 75 and 50 % of the heads, time to all heads.

    python -m benchmarks.table_7

Forward only, 256 and 512 tokens, in turns in one process; the baseline is PyTorch's fastest dense attention. The paper's ratios
stand next to ours: they are of other code, against another baseline, on another machine. Prints a table for the page.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.cases import Case, Contender
from benchmarks.core import contenders
from benchmarks.timing import Row, time_in_turns
from moh.evaluation.speed import device_name

SHARES = (0.9, 0.75, 0.5)
PAPER = {256: (0.98, 0.89, 0.63), 512: (0.98, 0.86, 0.63)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each length (default: %(default)s)")
    options = parser.parse_args()
    found = {}
    for length in PAPER:
        case = Case("core", "forward", options.batch, 32, 32, length, 64, options.dtype, shares=SHARES)
        found[length] = time_in_turns(ours(contenders(case)), seconds=options.seconds)
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print("\n".join(table(found, f"{machine}, {options.dtype}, batch {options.batch}")))


def ours(every: list[Contender]) -> list[Contender]:
    """Dense attention, and ours at each share."""
    return [contender for contender in every if contender.name in ("dense", "ours")]


def table(found: dict[int, list[Row]], about: str) -> list[str]:
    """One row per length and share."""
    lines = [
        f"Median and quartiles of the ratio within a round: {about}.",
        "",
        "| tokens | heads used | ours, time to dense | the paper's |",
        "| --- | --- | --- | --- |",
    ]
    for length, rows in found.items():
        by_share = {row.share: row for row in rows if row.contender == "ours"}
        for share, published in zip(SHARES, PAPER[length], strict=True):
            row = by_share[share]
            lines.append(
                f"| {length} | {share:.0%} | {row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) | {published:.2f} |"
            )
    return lines


if __name__ == "__main__":
    main()
