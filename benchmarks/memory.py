"""Subject `memory`: peak memory of attention on top of its inputs, ours and dense; Linux.

Each case is a process of its own: the kernel's high-water mark of resident memory, less what was resident before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import core, decode
from benchmarks.cases import Case, Contender
from benchmarks.timing import Row, rows

ROUNDS = 3
BASE = Case("memory", "forward", heads=8, kv_heads=8, length=2048, shares=(0.5, 1.0))


def cases(grid: str) -> list[Case]:
    """The cases of a grid, each once."""
    if grid == "quick":
        return [replace(BASE, length=512)]
    return [
        BASE,
        replace(BASE, causal=True),
        replace(BASE, dtype="bfloat16"),
        replace(BASE, mode="forward+backward"),
        replace(BASE, mode="forward+backward", dtype="bfloat16"),
        replace(BASE, heads=32, kv_heads=8),
        replace(BASE, heads=32, kv_heads=8, mode="forward+backward"),
        replace(BASE, heads=32, kv_heads=8, mode="decode", length=4096),
        *([replace(BASE, length=8192), replace(BASE, mode="forward+backward", length=8192)] if grid == "full" else []),
    ]


def measure(case: Case) -> list[Row]:
    """Bytes instead of seconds; see `timing.Row`.

    Raises:
        RuntimeError: the process failed, or the system has no such high-water mark.
    """
    environment = os.environ | {
        # Freed memory is returned at once, so that the next contender can't use it uncounted
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(case))]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _measure_here(case: Case) -> list[Row]:
    subject = decode if case.mode == "decode" else core
    kept = ("dense", "masked", "ours")
    found = [c for c in subject.contenders(case) if c.name in kept]
    torch.set_grad_enabled(case.backward)
    small = replace(case, batch=1, length=64)
    for contender in subject.contenders(small):  # starts threads, loads code
        contender.run()
    samples = [[_peak(c) for _ in range(ROUNDS)] for c in found]
    return rows(found, samples, 0)


def _peak(contender: Contender) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident memory
    before = _resident("VmRSS")
    result = contender.run()
    peak = _resident("VmHWM")
    del result
    return float(max(peak - before, 4096))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _main(arguments: Sequence[str]) -> None:
    case = Case.from_dict(json.loads(arguments[0]))
    print(json.dumps([asdict(row) for row in _measure_here(case)]))


if __name__ == "__main__":
    _main(sys.argv[1:])
