"""The results page and the table on the terminal, made from all JSON files.

`tables` chooses the numbers, `plots` draws the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import plots, tables
from benchmarks.results import Run, kernels_changed
from moh._files import write_text

INTRODUCTION = """\
Made by `make bench`: times of routed attention against PyTorch's dense attention.

- **dense**: `scaled_dot_product_attention` with all heads, the reference of all ratios.
- **ours**: backend `cpu` of `moh.moh_attention`; *ours (sdpa)*: its pure PyTorch backend.
- **ideal**: dense attention of a model that has only the active heads (with grouped queries: smaller groups, all
  keys and values).
- **masked**: dense attention, then weighted by the gates, as published MoH code does it.
- **limit**, of language models with random weights, ViT and DiT: the ratio to dense if every part were as fast as the dense
  model's and routing were free, counted in multiplications, when decoding in numbers that have to be read.
- **training**: forward and backward, without the optimiser; **autocast**: the same with float32 weights under `torch.autocast` to
  bfloat16.

Percentages are the share of active heads, rounded to whole heads: 90 % of 8 heads are 7. B is the batch, H the query heads
(H32/8: 8 heads of keys and values), N the tokens, D the width of a head. Attention alone gets random, balanced gates: the
same number of heads for each token, every head for the same number of tokens. Layers and models have learned routers with
random weights; their tokens choose any heads unless the case gives another unit: `group_balanced`, equally many in every
group that shares keys and values, or `kv_group`, whole groups. All contenders of a case take turns in one process; each
cell is the median ratio to dense in the same round, over at least 5 rounds (3 of more than a minute), ± half the distance
between the quartiles."""


def write_page(runs: Sequence[Run], page: Path, images: Path, results: Path) -> None:
    """Write the page and its pictures; `results` may have a `<cpu>.md` per CPU with remarks, included unchanged."""
    pictures, kernels = plots.draw(runs, images), kernels_changed()
    parts = ["# Speed", INTRODUCTION, _markdown(tables.machines(runs)), _markdown(tables.targets(runs))]
    parts.append(
        "Reached: the median of all cases of the target (lowest to highest). A target counts as missed if a single case "
        "misses it."
    )
    missed = tables.missed(runs)
    if missed:
        lines = "\n".join(f"- {line}" for line in missed)
        parts.append(f"The worst cases above *must*; the tables below have the others:\n\n{lines}")
    for letter, run in zip(tables.letters(runs), runs, strict=True):
        remarks = results / f"{run.machine.slug}.md"
        if remarks.is_file():
            parts.append(f"### On {letter}, {run.machine.cpu}\n\n{remarks.read_text(encoding='utf-8').strip()}")
    for title, picture in pictures:
        parts.append(f"## {title}\n\n![{title}]({_relative(picture, page.parent)})")
    for subject in tables.SUBJECTS:
        table = tables.subject_table(subject, runs, kernels)
        if table is not None:
            parts.append(_markdown(table))
    if kernels:
        parts.append(f"{tables.OLDER.strip()} measured before the CPU kernels changed last, on {kernels[:10]}.")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(parts) + "\n")


def print_tables(run: Run, subjects: Sequence[str]) -> None:
    """The tables of some subjects, for the terminal."""
    found = (tables.subject_table(subject, [run]) for subject in subjects)
    console = print_all([table for table in found if table is not None])
    console.print(f"{run.machine.cpu}, {run.machine.threads} threads, {run.machine.instruction_set}", highlight=False)


def print_all(found: Sequence[tables.Table]) -> Console:
    """Print tables on the terminal; in a file they get 200 columns."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in found:
        shown = RichTable(title=table.title, title_justify="left")
        for index, name in enumerate(table.header):
            shown.add_column(name, justify="left" if index < 2 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    return console


def _markdown(table: tables.Table) -> str:
    lines = [f"## {table.title}", ""]
    lines += [f"| {' | '.join(table.header)} |", "|" + " --- |" * len(table.header)]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines)


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()
