"""What tests of the CPU kernels share; also lets the tests of this directory import its `attention_cases`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moh.attention import cpu
from moh.attention.cpu.build import INSTRUCTION_SETS

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def kernels() -> None:
    """Skips the test, with the reason, where there are no kernels."""
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=[*INSTRUCTION_SETS, "portable"])
def isa(request: pytest.FixtureRequest, kernels: None) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    known = cpu.instruction_sets()
    if request.param not in known:
        pytest.skip(f"this build has no {request.param}")
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
