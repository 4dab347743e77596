"""The command line: choose cases, measure them, print tables, write results, page and pictures.

On the CPU; `--device cuda` is another command, `benchmarks/gpu.py`, which needs none of the extras.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.cases import GRIDS, Case
from benchmarks.results import Machine, Run, this_machine
from moh._extras import require
from moh.attention.cpu import BuildError

ROOT = Path(__file__).parents[1]
SECONDS = {"quick": 0.3, "default": 1.5, "full": 1.5}

DESCRIPTION = """\
Time routed attention against dense attention on this CPU: about a quarter of an hour by default.
Writes benchmarks/results/<cpu>.json, docs/results/speed.md (from all such files) and docs/images/speed_*.png;
--quick writes to runs/benchmarks instead. Keep the machine quiet.
For a GPU: python -m benchmarks --device cuda --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code: 0, 1 if a case failed, 2 for bad input, 130 if interrupted."""
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    if any(word.split("=")[0] == "--device" for word in words):
        from benchmarks import gpu

        return gpu.main(words)
    from benchmarks import report

    options = _parser().parse_args(words)
    if options.output_dir is None and options.grid == "quick" and not options.compare:
        options.output_dir = ROOT / "runs" / "benchmarks"
    home: Path | None = options.output_dir
    results = home or ROOT / "benchmarks" / "results"
    page, images = (home / "speed.md", home) if home else (ROOT / "docs/results/speed.md", ROOT / "docs/images")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        os.environ["MOH_CPU_ISA"] = options.isa
    failed = 0
    try:
        if not options.report_only:
            cases = _cases(options)
            if options.list:
                print("\n".join(case.key for case in cases))
                return 0
            if options.compare:
                _compare(options, list(dict.fromkeys(case.subject for case in cases)))
                return 0
            failed = _measure(options, cases, results)
    except (ValueError, BuildError, OSError, ImportError) as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; resume with --resume", file=sys.stderr)
        return 130
    runs = [Run.load(path) for path in sorted(results.glob("*.json")) if ".partial" not in path.suffixes]
    if not runs:
        print(f"benchmarks: no results in {results}", file=sys.stderr)
        return 2
    report.write_page(runs, page, images, results)
    print(f"{page}\n{failed} failed" if failed else page)
    return 1 if failed else 0


def _cases(options: argparse.Namespace) -> list[Case]:
    from benchmarks import runner

    unknown = sorted(set(options.subjects) - set(runner.SUBJECTS))
    if unknown:
        raise ValueError(f"SUBJECT must be of {', '.join(runner.SUBJECTS)}, got {', '.join(unknown)}")
    for subject in runner.NEEDED.keys() & set(options.subjects):
        package, extra = runner.NEEDED[subject]
        require(package, extra=extra)
    if not options.subjects:
        options.subjects = _possible(runner.SUBJECTS, runner.NEEDED)
    for name in ("model", "dtype"):
        if (value := getattr(options, name)) and "model" not in options.subjects:
            subjects = ", ".join(options.subjects)
            raise ValueError(
                f"--{name} {value} is for the subject model alone, got {subjects}: add model or leave it out"
            )
    cases = runner.select(
        options.subjects, options.grid, checkpoint=options.model, dtype=options.dtype or "float32", only=options.only
    )
    if not cases:
        raise ValueError(f"no case of {', '.join(options.subjects)} has {options.only!r} in its name")
    return cases


def _possible(subjects: Sequence[str], needed: Mapping[str, tuple[str, str]]) -> list[str]:
    """The subjects whose packages are installed; says in one line which are left out."""
    missing = {s: extra for s, (package, extra) in needed.items() if importlib.util.find_spec(package) is None}
    if missing:
        extras = ",".join(missing.values())
        print(
            f"benchmarks: without {' and '.join(missing)}, which need more packages: "
            f"{sys.executable} -m pip install -e '.[{extras}]'",
            file=sys.stderr,
        )
    return [subject for subject in subjects if subject not in missing]


def _measure(options: argparse.Namespace, cases: Sequence[Case], results: Path) -> int:
    from benchmarks import report, runner

    machine = this_machine()
    partial, final = results / f"{machine.slug}.partial.json", results / f"{machine.slug}.json"
    run = _resumed(partial, machine) if options.resume else Run(machine)
    seconds = SECONDS[options.grid] if options.seconds is None else options.seconds
    failed = runner.measure_missing(cases, run, partial, functools.partial(runner.measure, seconds=seconds))
    report.print_tables(run, options.subjects)
    merged = Run.load(final).merged(run, part=bool(options.only)) if final.exists() else run
    merged.save(final)
    partial.unlink(missing_ok=True)
    return failed


def _compare(options: argparse.Namespace, subjects: Sequence[str]) -> None:
    """Print what the working tree changed against another commit, in these subjects."""
    from benchmarks import compare, report

    if options.output_dir or options.resume:
        raise ValueError("--compare prints its tables and keeps nothing: it takes neither --output-dir nor --resume")
    same = [] if options.grid == "default" else [f"--{options.grid}"]
    for name in ("only", "seconds", "threads", "isa", "model", "dtype"):
        if value := getattr(options, name):
            same += [f"--{name}", str(value)]
    report.print_all(compare.compare(ROOT, options.compare, subjects, same))


def _resumed(partial: Path, machine: Machine) -> Run:
    """The results of an interrupted run.

    Raises:
        ValueError: another machine measured them.
    """
    if not partial.exists():
        return Run(machine)
    run = Run.load(partial)
    if run.machine != machine:
        raise ValueError(
            f"{partial} was measured on {run.machine}, this is {machine}: run without --resume to start again"
        )
    return run


def _parser() -> argparse.ArgumentParser:
    from benchmarks import runner

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(runner.SUBJECTS)} (default: all)"
    )
    parser.set_defaults(grid="default")
    for grid, words in zip(
        GRIDS, ("a few small cases, to check that everything works", "", "the whole grid: many hours"), strict=True
    ):
        if words:
            parser.add_argument(f"--{grid}", dest="grid", action="store_const", const=grid, help=words)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this text in their name, see --list")
    parser.add_argument("--list", action="store_true", help="print the cases' names, measure nothing")
    parser.add_argument(
        "--seconds", type=float, help="per case, beyond its 5 rounds, or 3 of over a minute (default: 1.5)"
    )
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--isa", help="instruction set of our kernels (default: the most capable)")
    parser.add_argument("--model", metavar="DIR", help="language model to use instead of random weights, dense or MoH")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="of a language model's weights (default: float32)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="everything goes here")
    parser.add_argument(
        "--compare",
        metavar="COMMIT",
        help="measure with the code of COMMIT too, in turns, and print what changed, with its spread; writes nothing",
    )
    parser.add_argument("--report-only", action="store_true", help="only write page and pictures from existing results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
