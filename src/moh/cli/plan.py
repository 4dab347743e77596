"""`moh convert --plan`: what shares of the heads save in a model, before any work."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import revision
from moh.cli.options import print_result
from moh.config import FIXED

if TYPE_CHECKING:
    from moh.conversion.plan import Plan

_SHARES = (0.9, 0.75, 0.5)
_BENCHMARKS = Path("benchmarks/results")
"""Where `python -m benchmarks` writes its results, from the directory of the sources."""


def show(arguments: Namespace) -> None:
    """Print the plan of the model given on the command line, from its configuration alone.

    Raises:
        ValueError: the model can't be converted, or the options contradict each other.
    """
    from moh.conversion.plan import plan
    from moh.models.heads import requested_share

    if arguments.router == FIXED or arguments.layers not in (None, "keep"):
        raise ValueError("--plan counts routed heads: leave out --router fixed and --layers")
    share = requested_share(arguments.share, shared_heads=arguments.shared_heads, active_heads=arguments.active_heads)
    found = plan(arguments.model, revision=revision(arguments).get("revision"))
    if share is None:
        share = _share_of(arguments, found)
    router = arguments.router or found.router
    shares = sorted({share, *_SHARES}, reverse=True)
    saved = {s: [found.saved(s, n, router=router) for n in found.lengths] for s in shares}
    measured = list(_measured(found))
    print_result(
        arguments,
        {
            "model": found.name,
            "share": share,
            "router": router,
            "work": [vars(found.work(n)) for n in found.lengths],
            "saved": [
                {"share": s, "tokens": n, "part": part}
                for s in shares
                for n, part in zip(found.lengths, saved[s], strict=True)
            ],
            "measured": measured,
        },
        [*_table(found, saved), "", _verdict(found, share, saved[share]), *_measured_lines(measured)],
    )


def _share_of(arguments: Namespace, found: Plan) -> float:
    """The share that numbers of heads are."""
    heads = found.layers[0].num_heads
    shared = arguments.shared_heads
    if shared is None:
        from moh.routing import router_class

        shared = router_class(arguments.router or found.router).default_shared_heads(heads)
    used = shared + arguments.active_heads
    if min(shared, arguments.active_heads) < 0 or not 0 < used <= heads:
        raise ValueError(
            f"shared_heads and active_heads must be 1 to {heads} in total, got {shared} and {arguments.active_heads}"
        )
    return float(used / heads)


def _table(found: Plan, saved: Mapping[float, list[float]]) -> list[str]:
    first = found.layers[0]
    groups = "" if first.kv_heads == first.num_heads else f", {first.kv_heads} of keys and values"
    lines = [
        f"{found.name}: {len(found.layers)} attention layers of {first.num_heads} heads{groups}, each {first.head_width} wide"
    ]
    work = [found.work(n) for n in found.lengths]

    def row(title: str, cells: list[str]) -> str:
        return f"  {title:46s}" + "".join(f"{cell:>16s}" for cell in cells)

    lines.append(row("multiplications of one forward pass", [f"{n:,} tokens" for n in found.lengths]))
    lines.append(row("attention itself: fewer heads save", [f"{100 * w.core:.0f} %" for w in work]))
    lines.append(row("queries and output projection: likewise", [f"{100 * w.projections:.0f} %" for w in work]))
    lines.append(row("keys, values, MLPs: always in full", [f"{100 * w.rest:.0f} %" for w in work]))
    for share, parts in saved.items():
        lines.append(row(f"--share {share:g} saves at most", [f"{100 * part:.0f} %" for part in parts]))
    if found.causal:
        sizes = [_size(w.cache_bytes or 0) for w in work]
        lines.append(row(f"cache of keys and values, {found.dtype}, unchanged", sizes))
    return lines


def _verdict(found: Plan, share: float, saved: list[float]) -> str:
    from moh.conversion.plan import LENGTHS, NEXT_TO_NOTHING

    parts = [
        f"{'next to nothing' if part < NEXT_TO_NOTHING else f'up to {100 * part:.0f} %'} at {n:,} tokens"
        for n, part in zip(found.lengths, saved, strict=True)
    ]
    text = f"Of the multiplications a share of {share:g} saves {', '.join(parts)}."
    if all(part < NEXT_TO_NOTHING for part in saved):
        text += " Fewer heads won't make this model faster."
    if found.positions is not None and max(LENGTHS) > found.positions:
        text += f" The model supports {found.positions:,} tokens."
    return text


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _measured(found: Plan) -> Iterator[dict[str, Any]]:
    """Times of our kernels relative to dense attention on this CPU, from `benchmarks/results`, if they are there.

    Of a whole model with the same heads if one was measured, else of attention itself with heads of the nearest width.
    """
    from moh.evaluation.speed import cpu_name

    results: list[dict[str, Any]] = []
    for file in sorted(_BENCHMARKS.glob("*.json")):
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            if run["machine"]["cpu"] == cpu_name():
                results += [result for result in run["results"] if result["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a file of `make bench`
    first, forward = found.layers[0], ("prefill", "forward")
    same = (first.num_heads, first.kv_heads, first.head_width, len(found.layers))
    cases = [r for r in results if r["case"]["mode"] in forward and r["case"]["routing_unit"] == "head"]
    names = ("heads", "kv_heads", "width", "layers")
    chosen = [r for r in cases if tuple(r["case"][name] for name in names) == same]
    if not chosen:
        cores = [r for r in cases if r["case"]["subject"] == "core" and r["case"]["causal"] == found.causal]
        nearest = min((abs(r["case"]["width"] - first.head_width) for r in cores), default=0)
        chosen = [r for r in cores if abs(r["case"]["width"] - first.head_width) == nearest]
    for result in chosen:
        for row in result["rows"]:
            if row["contender"] == "ours" and row["share"] is not None and row["share"] < 1:
                case = {name: result["case"][name] for name in ("subject", "length", "dtype", *names)}
                yield {**case, "share": row["share"], "time": row["ratio"], "date": result["date"][:10]}


def _measured_lines(measured: list[dict[str, Any]]) -> list[str]:
    if not measured:
        return []
    whole = measured[0]["subject"] != "core"
    lines = [
        "",
        f"Measured on this CPU ({_BENCHMARKS}), time relative to dense {'models' if whole else 'attention alone'}:",
    ]
    cases: dict[tuple[Any, ...], list[str]] = {}
    for row in measured:
        key = (row["length"], row["heads"], row["kv_heads"], row["width"], row["dtype"])
        cases.setdefault(key, []).append(f"{row['time']:.2f} at {row['share']:.2g}")
    for (length, heads, kv_heads, width, dtype), times in sorted(cases.items()):
        lines.append(f"  {length:,} tokens, {heads}/{kv_heads} heads of {width}, {dtype}: {', '.join(times)}")
    return lines
