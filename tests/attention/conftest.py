"""Fixtures for tests of compiled kernels; lets the tests of this directory import its `*_cases`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moh.attention import cpu

sys.path.insert(0, str(Path(__file__).parent))

from attention_cases import ISAS


@pytest.fixture
def kernels() -> None:
    """Skips the test, with the reason, if the kernels can't be built."""
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=ISAS)
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


@pytest.fixture
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[int, ...]]]:
    """`recorded_launches(*modules)` replaces their Triton kernels; returns kernel name -> grid of its launch.

    A launch outside `torch.cuda.device_of` is an error, as Triton launches on the current device.
    """
    launches: dict[str, tuple[int, ...]] = {}
    guarded = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        guarded.append(x.device)
        yield
        guarded.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert guarded, self.name
            launches[self.name] = grid
            return lambda *args, **options: None

    def record(*modules: ModuleType) -> dict[str, tuple[int, ...]]:
        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        for module in modules:
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Kernel(name))
        return launches

    return record
