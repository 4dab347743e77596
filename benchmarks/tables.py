"""The results as tables of text, for the terminal and the page: one per subject, rows of a case on all CPUs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.limits import limit
from benchmarks.results import Machine, Result, Run
from benchmarks.targets import TARGETS, Reached, judge
from benchmarks.timing import Row

NOTHING = "–"
OLDER = " †"


@dataclass(frozen=True)
class Table:
    """A title and cells of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


SUBJECTS = {
    "core": "Attention alone",
    "decode": "Decoding: attention of one token to a cache",
    "layer": "Whole layer, width H times D",
    "model": "Language model of SmolLM2-135M's size",
    "vision": "Stack of blocks of ViT-B's size",
    "images": "Image classifiers",
    "diffusion": "Diffusion transformers: one denoising step",
    "memory": "Peak memory on top of the inputs",
}


def letters(runs: Sequence[Run]) -> list[str]:
    """A short name per CPU: A, B, ..."""
    return [chr(ord("A") + index) for index in range(len(runs))]


def machines(runs: Sequence[Run]) -> Table:
    """The machines of the runs."""
    header = (
        "",
        "CPU",
        "threads",
        "our kernels' instruction set",
        "AMX",
        "BF16 dot products",
        "torch",
        "commit",
        "date",
    )
    rows = [(letter, *_machine(run.machine), *_origin(run)) for letter, run in zip(letters(runs), runs, strict=True)]
    return Table("Machines", header, tuple(rows))


def _machine(m: Machine) -> tuple[str, ...]:
    yes = {True: "yes", False: "no"}
    return m.cpu, str(m.threads), m.instruction_set, yes[m.amx], yes[m.bf16], m.torch


def _origin(run: Run) -> tuple[str, str]:
    commits = sorted({r.commit for r in run.results if r.commit})
    dates = sorted({r.date[:10] for r in run.results if r.date})
    return ", ".join(commits) or NOTHING, " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else NOTHING


def targets(runs: Sequence[Run]) -> Table:
    """Each target, and per CPU the median of its cases (lowest to highest) and how many of them reach it."""
    header = ("ratio to dense SDPA", "must", "aim with AMX", "aim without", *(f"reached on {x}" for x in letters(runs)))
    rows = []
    for target in TARGETS:
        aim = f"{target.aim:g}" + (f" (bfloat16 {target.aim_bfloat16:g})" if target.aim_bfloat16 else "")
        reached = (_reached(judge(target, run)) for run in runs)
        rows.append((target.what, f"{target.must:g}", f"{target.aim_amx:g}", aim, *reached))
    return Table("Targets", header, tuple(rows))


def _reached(reached: Reached) -> str:
    values = [value for value, _, _ in reached.values]
    if not values:
        return "not measured"
    count, missed = len(values), len(reached.missed)
    must = "must reached" if not missed else f"**must missed** in {missed} of {count}"
    spread = f" ({values[0]:.3g} to {values[-1]:.3g})" if count > 1 else ""
    middle = (values[(count - 1) // 2] + values[count // 2]) / 2
    return f"{middle:.3g}{spread}; {must}, aim reached in {reached.aims} of {count}"


def missed(runs: Sequence[Run]) -> list[str]:
    """For each target the worst case above it on each machine, as text."""
    lines = []
    for target in TARGETS:
        cases = [(letter, judge(target, run).missed) for letter, run in zip(letters(runs), runs, strict=True)]
        worst = [f"{letter} {found[0][0]:.2f} ({found[0][1].label})" for letter, found in cases if found]
        if worst:
            lines.append(f"{target.what}, {target.must:g}: {', '.join(worst)}")
    return lines


def subject_table(subject: str, runs: Sequence[Run], kernels: str = "") -> Table | None:
    """All cases of a subject; None if nothing was measured. Rows older than `kernels`, a time in ISO 8601, are marked."""
    found: dict[str, list[tuple[str, Result]]] = {}
    for letter, run in zip(letters(runs), runs, strict=True):
        for result in run.results:
            if result.case.subject == subject:
                found.setdefault(result.case.key, []).append((letter, result))
    if not found:
        return None
    results = [result for same in found.values() for _, result in same]
    shares = sorted({r.share for result in results for r in result.rows if r.contender == "ours" and r.share})
    half = min(shares, key=lambda share: (abs(share - 0.5) > 0.17, -share), default=0.5)
    models = subject in ("images", "diffusion")
    masked = sorted({r.share for result in results for r in result.rows if r.contender == "masked" and r.share})
    others = [x for x in ("ours (sdpa)", "ideal") if any(r.contender == x for q in results for r in q.rows)]
    routing = any(r.contender == "routing" for result in results for r in result.rows)
    header = (
        "case",
        "CPU",
        "dense, MB" if subject == "memory" else "dense, ms",
        *([RATES[subject]] if models else []),
        *(
            words
            for share in shares
            for words in _with_limit(subject, share, f"ours, {share:.0%}", f"limit, {share:.0%}")
        ),
        *(f"{name}, {half:.0%}" for name in others),
        *(f"masked, {share:.0%}" for share in masked),
        *(["routing, of ours at 50%"] if routing else []),
    )
    rows = []
    for same in sorted(found.values(), key=lambda same: _order(same[0][1].case)):
        for letter, result in same:
            label = _label(result.case)
            letter += OLDER if result.date < kernels else ""
            if result.error is not None:
                rows.append((label, letter, f"failed: {result.error}", *[NOTHING] * (len(header) - 3)))
                continue
            cells: list[str] = []
            for share in shares:
                ours = result.row("ours", share)
                cells += _with_limit(subject, share, _ratio(ours), _limit(result.case, ours))
            cells += [_ratio(result.row(name, half)) for name in others]
            cells += [_ratio(result.row("masked", share)) for share in masked]
            rate = [_rate(result)] if models else []
            rows.append((label, letter, _absolute(result), *rate, *cells, *([_routing(result)] if routing else [])))
    return Table(SUBJECTS[subject], header, tuple(rows))


def _with_limit(subject: str, share: float, ours: str, limit: str) -> list[str]:
    """A column of ours and the next one, with the computed limit: for models with fewer heads."""
    return [ours, limit] if subject in ("model", "images", "diffusion") and share < 1 else [ours]


def _limit(case: Case, ours: Row | None) -> str:
    """The computed limit of a row, of the whole number of heads that it had."""
    value = None if ours is None or ours.share is None else limit(case, ours.share)
    return NOTHING if value is None else f"{value:.2f}"


RATES = {"images": "dense, images/s", "diffusion": "dense, steps/s"}
"""A step denoises the whole batch once."""


def _rate(result: Result) -> str:
    row = result.row("dense")
    if row is None:
        return NOTHING
    return _three_digits((result.case.batch if result.case.subject == "images" else 1) / row.median)


def _order(case: Case) -> tuple[object, ...]:
    sizes = (case.batch, case.heads, -case.kv_heads, case.width, case.length)
    return case.mode, case.dtype != "float32", case.causal, case.router or "", sizes, case.routing_unit != "head"


def _label(case: Case) -> str:
    return f"{case.mode}, {case.label}".replace("forward+backward", "forward + backward")


def _absolute(result: Result) -> str:
    row = result.row("dense")
    if row is None:
        return NOTHING
    scale = 1e-6 if result.case.subject == "memory" else 1e3
    return f"{_three_digits(row.median * scale)} ± {_three_digits((row.high - row.low) / 2 * scale, 2)}"


def _three_digits(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _ratio(row: Row | None) -> str:
    return NOTHING if row is None else f"{row.ratio:.2f} ± {(row.ratio_high - row.ratio_low) / 2:.2f}"


def _routing(result: Result) -> str:
    routing, ours = result.row("routing", 0.5), result.row("ours", 0.5)
    return NOTHING if routing is None or ours is None else f"{routing.median / ours.median:.1%}"
