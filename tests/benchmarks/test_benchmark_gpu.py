"""Promises of the benchmarks of a GPU: they say when there is none, and what they run runs (here on the CPU, tiny)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cases
from benchmarks.__main__ import main
from benchmarks.cases import Contender

TINY = dict(batch=1, heads=4, kv_heads=2, length=16, width=16, dtype="float32", shares=(0.5,))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {title: [replace(c, **TINY) for c in cases] for title, cases in gpu_cases.gpu_cases("quick").items()}
    monkeypatch.setattr(gpu, "gpu_cases", lambda grid: quick)
    monkeypatch.setattr(gpu_cases, "OURS", ("sdpa",))  # FlexAttention takes a minute to compile for the CPU
    monkeypatch.setattr(gpu, "clock", lambda run, device: [(run(), 1e-3)[1]])


@no_gpu
def test_without_a_gpu_it_says_so_and_measures_nothing(capsys):
    assert main(["--device", "cuda"]) == 2
    assert main(["--device=cuda", "--check"]) == 2
    said = capsys.readouterr()
    assert "needs a CUDA device, and PyTorch finds none here" in said.err and not said.out


def test_page_holds_checks_and_every_contender(tiny):
    page, failed = gpu.run("quick", device="cpu", backends=())
    assert "## Checks" in page and "synchronisation: not checked" in page
    for title in ("## Attention alone", "## Decoding", "## Whole layer"):
        assert title in page
    for words in ("dense (math) | all", "ours (sdpa) | 50%", "masked (dense, then gates) | 50%", "ours | 50%"):
        assert words in page
    assert failed == 0
    assert "dense (cudnn) | all | failed:" in page  # what the machine lacks is said, not left out


def test_failed_contender_of_ours_counts_as_failure(tiny, monkeypatch):
    def broken(*arguments: object) -> list[Contender]:
        def fail() -> None:
            raise RuntimeError("out of luck")

        return [Contender("dense", lambda: None), Contender("ours (triton)", fail, 0.5, 0.5)]

    monkeypatch.setattr(gpu, "contenders", broken)
    page, failed = gpu.run("quick", device="cpu", backends=())
    assert failed == 4 and "ours (triton) | 50% | failed: out of luck" in page


def test_a_case_that_cannot_be_made_is_told_and_the_page_goes_on(tiny, monkeypatch):
    def broken(case: object, device: str) -> list[Contender]:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(gpu, "contenders", broken)
    page, failed = gpu.run("quick", device="cpu", backends=())
    assert failed == 4 and page.count("none could be made: no memory left") == 4


def test_waiting_for_the_device_counts_as_failure(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "_synchronisation", lambda device: f"`triton` {gpu.FAILED}: it waits; `flex` is fine")
    page, failed = gpu.run("quick", device="cpu", only_check=True, backends=())
    assert failed == 1 and "it waits" in page


def test_check_alone_measures_nothing(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "outcomes_of", lambda name, device: [gpu_outcome(name)])
    page, failed = gpu.run("quick", device="cpu", only_check=True, backends=("sdpa",))
    assert failed == 1 and "FAILED one: bad" in page and "## Attention alone" not in page


def gpu_outcome(name: str) -> object:
    from moh.attention.conformance import Outcome

    return Outcome("one", failure="bad")


@pytest.mark.parametrize("grid", gpu_cases.GPU_GRIDS)
def test_cases_are_of_the_targets_sizes_and_each_once(grid):
    tables = gpu_cases.gpu_cases(grid)
    keys = [case.key for cases in tables.values() for case in cases]
    assert len(set(keys)) == len(keys)
    if grid != "quick":
        assert {case.width for case in tables["Attention alone"]} == {64, 128}
        assert any(case.heads * case.width == 4096 for case in tables["Whole layer"])


def test_clock_tells_seconds_of_every_round():
    times = gpu.clock(lambda: None, "cpu", rounds=3)
    assert len(times) == 3 and all(t >= 0 for t in times)


@pytest.mark.slow
def test_it_needs_no_extra():
    blocked = "timm rich tqdm matplotlib transformers torchvision diffusers".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from benchmarks.__main__ import main; "
    code += "sys.exit(main(['--device', 'cuda', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
