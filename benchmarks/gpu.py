"""`python -m benchmarks --device cuda`: routed attention on a GPU against every dense attention there, in one file.

Needs only torch and moh. `gpu_cases.py` has the cases; this file has the command, the clock and the page.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import Case, Contender
from benchmarks.gpu_cases import GPU_GRIDS, contenders, gpu_cases
from benchmarks.results import commit
from moh._files import write_text
from moh.attention.testing import PROJECTIONS, outcomes_of, summary

ROOT = Path(__file__).parents[1]
ROUNDS = 15
FAILED = "FAILED"
CHECKED = ("triton", "flex", "sdpa", PROJECTIONS)

DESCRIPTION = """\
Time routed attention on this GPU against PyTorch's attention with each of its backends, FlashAttention where it is
installed, and dense-then-mask, and projections of active heads against dense ones; check that all backends and
projections agree with the definition; write one Markdown file."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmarks of a GPU; returns the exit code: 0, 1 if something failed, 2 for bad input or no GPU."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks: --device cuda needs a CUDA device, and PyTorch finds none here "
            f"(torch {torch.__version__}, built for {torch.version.cuda or 'the CPU'})",
            file=sys.stderr,
        )
        return 2
    page, failed = run(options.grid, device="cuda", only_check=options.check)
    output = options.output or ROOT / "runs" / "gpu" / f"{_slug(torch.cuda.get_device_name())}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    print(f"{output}\n{failed} failed" if failed else output)
    return 1 if failed else 0


def run(grid: str, *, device: str, only_check: bool = False, backends: Sequence[str] = CHECKED) -> tuple[str, int]:
    """(the page, how many checks and cases failed)."""
    lines = [f"# Routed attention on {_device_name(device)}", "", *_machine(device), "", "## Checks", ""]
    failed = 0
    for name in backends:
        outcomes = outcomes_of(name, device)
        failed += sum(o.failure is not None for o in outcomes)
        lines += [
            f"- {line}" if not line.startswith(" ") else f"    - {line.strip()}" for line in summary(name, outcomes)
        ]
    synchronisation = _synchronisation(device)
    failed += synchronisation.count(FAILED)
    lines += [f"- {synchronisation}"]
    print("\n".join(lines), flush=True)
    if not only_check:
        for title, cases in gpu_cases(grid).items():
            table, broken = _table(title, cases, device)
            lines += table
            failed += broken
    return "\n".join(lines) + "\n", failed


def _table(title: str, cases: Sequence[Case], device: str) -> tuple[list[str], int]:
    lines = ["", f"## {title}", ""]
    lines += ["| case | contender | heads | ms | ± | ratio to the fastest dense |", "|" + " --- |" * 6]
    failed = 0
    for case in cases:
        measured: list[tuple[Contender, list[float]]] = []
        try:
            found = contenders(case, device)
        except Exception as error:  # out of memory, or a device left unusable by an earlier failure
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            lines.append(f"| {case.mode}, {case.label} | none could be made: {reason} | | | | |")
            failed += 1
            continue
        for contender in found:
            try:
                measured.append((contender, clock(contender.run, device)))
            except Exception as error:  # a contender missing for this GPU, dtype or shape: continue with the others
                reason = " ".join(str(error).split())[:120] or type(error).__name__
                lines.append(
                    f"| {case.mode}, {case.label} | {contender.name} | {_share(contender)} | failed: {reason} | | |"
                )
                failed += contender.name.startswith("ours")
        best = min((statistics.median(t) for c, t in measured if c.name.startswith("dense")), default=float("nan"))
        for contender, times in measured:
            middle = statistics.median(times)
            spread = (max(times) - min(times)) / 2
            cells = (f"{case.mode}, {case.label}", contender.name, _share(contender), f"{middle * 1e3:.3f}")
            lines.append(f"| {' | '.join(cells)} | {spread * 1e3:.3f} | {middle / best:.2f} |")
            print(lines[-1], flush=True)
    return lines, failed


def _share(contender: Contender) -> str:
    return "all" if contender.actual is None else f"{contender.actual:.0%}"


def clock(run: Callable[[], object], device: str, *, rounds: int = ROUNDS) -> list[float]:
    """Seconds of each round, after two to warm up; on a GPU by its own events, many calls to a round if they are short."""
    for _ in range(2):
        run()
    repeats = max(1, min(50, int(5e-3 / max(_once(run, device, 1), 1e-6))))
    return [_once(run, device, repeats) for _ in range(rounds)]


def _once(run: Callable[[], object], device: str, repeats: int) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _synchronisation(device: str) -> str:
    """Whether a routed forward and backward pass ever waits for the device, and whether a CUDA graph can capture it."""
    if device == "cpu":
        return "synchronisation: not checked, as there is no CUDA device"
    core = Case("core", "forward+backward", 2, 8, 2, 512, 64, "bfloat16", True, shares=(0.5,))
    both = [(core, "triton"), (core, "flex")] + [(replace(core, subject=PROJECTIONS), n) for n in ("queries", "output")]
    found = [f"`{name}` {_waits(case, name)}" for case, name in both]
    return "synchronisation and CUDA graphs: " + "; ".join(found)


def _waits(case: Case, name: str) -> str:
    chosen = next((c for c in contenders(case, "cuda") if c.name == f"ours ({name})"), None)
    if chosen is None:
        return "does not support it"
    before = torch.cuda.get_sync_debug_mode()
    try:
        for _ in range(3):  # compilation may wait
            chosen.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        chosen.run()
        torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chosen.run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # reported on the page, whatever it is
        return f"{FAILED}: {' '.join(str(error).split())[:200]}"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "never waits and runs in a graph"


def _machine(device: str) -> Iterator[str]:
    """The facts needed to compare the numbers with others."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    yield f"- GPU: {_device_name(device)}"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield f"- {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB, " + (
            f"sm_{properties.major}{properties.minor}"
        )
    yield f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {installed('triton')}, " + (
        f"flash-attn {installed('flash-attn')}, Python {platform.python_version()}"
    )
    yield f"- commit {commit() or 'unknown'}, {datetime.datetime.now(datetime.UTC).date()}"
    yield (
        "- times are medians of "
        f"{ROUNDS} rounds ± half their range; ratios are to the fastest dense contender of the same case"
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or 'CPU'} (no GPU)"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --device cuda",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda"], required=True)
    parser.set_defaults(grid="default")
    for name in GPU_GRIDS:
        if name != "default":
            parser.add_argument(f"--{name}", dest="grid", action="store_const", const=name)
    parser.add_argument("--check", action="store_true", help="only check correctness, measure nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: runs/gpu/<name of the GPU>.md)")
    return parser
