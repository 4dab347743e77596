"""The command: check backends and projections on this machine and tell what failed and what was skipped, and why."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from moh.attention.conformance.checks import Outcome, check
from moh.attention.conformance.projections import check_projections
from moh.attention.dispatch import backends

PROJECTIONS = "projections"
"""The name, beside those of the backends, of the Triton projections of active heads."""

MIN_WIDTH_ON_CUDA = 16
"""FlexAttention serves no narrower heads there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the backends and the projections; returns 0, 1 if a check failed, 2 if the device is missing."""
    names = [b.name for b in backends() if b.name != "reference"] + [PROJECTIONS]
    parser = argparse.ArgumentParser(prog="python -m moh.attention.conformance", description=main.__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("conformance: --device cuda: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    failed = 0
    for name in options.backend:
        outcomes = outcomes_of(name, options.device)
        print("\n".join(summary(name, outcomes)), flush=True)
        failed += sum(o.failure is not None for o in outcomes)
    return 1 if failed else 0


def outcomes_of(name: str, device: str) -> list[Outcome]:
    """All checks of the backend of this name, or of the projections."""
    if name == PROJECTIONS:
        return list(check_projections(device))
    backend = next(b for b in backends() if b.name == name)
    return list(check(backend, device, min_width=MIN_WIDTH_ON_CUDA if device == "cuda" else 1))


def summary(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Lines that tell how many checks passed, and each failure and reason to skip."""
    failures = [o for o in outcomes if o.failure is not None]
    reasons = Counter(o.skipped for o in outcomes if o.skipped is not None)
    passed = len(outcomes) - len(failures) - reasons.total()
    lines = [f"{name}: {passed} of {len(outcomes)} checks passed, {len(failures)} failed, {reasons.total()} skipped"]
    lines += [f"  skipped {count}: {reason}" for reason, count in reasons.items()]
    return lines + [f"  FAILED {o.name}: {o.failure}" for o in failures]


if __name__ == "__main__":
    sys.exit(main())
