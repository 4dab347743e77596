"""Promises of the GPU benchmarks: they report a missing GPU, and their cases run (here on the CPU, tiny)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_counts
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
    for title in ("## Attention alone", "## Decoding", "## Projections", "## Whole layer"):
        assert title in page
    for words in ("dense (math) | all", "ours (sdpa) | 50%", "masked (dense, then gates) | 50%", "ours | 50%"):
        assert words in page
    assert failed == 0
    # What the machine lacks is reported, not left out.
    assert "dense (cudnn) | all | failed:" in page and "active heads alone | all | failed: it runs on NVIDIA" in page


def test_failed_contender_of_ours_counts_as_failure(tiny, monkeypatch):
    def broken(*arguments: object) -> list[Contender]:
        def fail() -> None:
            raise RuntimeError("out of luck")

        return [Contender("dense", lambda: None), Contender("ours (triton)", fail, 0.5, 0.5)]

    monkeypatch.setattr(gpu, "contenders", broken)
    page, failed = gpu.run("quick", device="cpu", backends=())
    assert failed == 5 and "ours (triton) | 50% | failed: out of luck" in page


def test_a_case_that_cannot_be_made_is_told_and_the_page_goes_on(tiny, monkeypatch):
    def broken(case: object, device: str) -> list[Contender]:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(gpu, "contenders", broken)
    page, failed = gpu.run("quick", device="cpu", backends=())
    assert failed == 5 and page.count("none could be made: no memory left") == 5


def test_waiting_for_the_device_counts_as_failure(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "_synchronisation", lambda device: f"`triton` {gpu.FAILED}: it waits; `flex` is fine")
    page, failed = gpu.run("quick", device="cpu", only_check=True, backends=())
    assert failed == 1 and "it waits" in page


def test_check_alone_measures_nothing(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "outcomes_of", lambda name, device: [gpu_outcome(name)])
    page, failed = gpu.run("quick", device="cpu", only_check=True, backends=("sdpa",))
    assert failed == 1 and "FAILED one: bad" in page and "## Attention alone" not in page


def gpu_outcome(name: str) -> object:
    from moh.attention.testing import Outcome

    return Outcome("one", failure="bad")


@pytest.mark.parametrize("grid", gpu_cases.GPU_GRIDS)
def test_cases_are_of_the_targets_sizes_and_each_once(grid):
    tables = gpu_cases.gpu_cases(grid)
    keys = [case.key for cases in tables.values() for case in cases]
    assert len(set(keys)) == len(keys)
    if grid != "quick":
        assert {case.width for case in tables["Attention alone"]} == {64, 128}
        assert any(case.heads * case.width == 4096 for case in tables["Whole layer"])
        assert {case.width for case in tables["Projections"]} == {64, 128}


def test_layers_of_a_gpu_are_measured_with_sparse_and_with_dense_projections(monkeypatch):
    """The layers hold fake tensors; their choices are recorded."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moh.attention import projections
    from moh.attention.gpu import backend as gpu_backend
    from moh.attention.gpu.projections import dense_is_faster

    chosen = []

    def seen(*arguments: object) -> str | None:
        reason = dense_is_faster(
            tokens=8192, heads=32, width=128, channels=4096, share=0.9, dtype=torch.bfloat16, major=9
        )
        chosen.append("sparse" if reason is None else "dense")
        return None

    monkeypatch.setattr(projections, "_sparse_kernels", seen)
    monkeypatch.setattr(gpu_backend, "unavailable", lambda device: None)
    # fake weights can't be moved, and are on the device already
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    case = replace(gpu_cases.gpu_cases("default")["Whole layer"][0], **TINY)
    with FakeTensorMode(), torch.device("cuda"):
        found = {c.name: c for c in gpu_cases.contenders(case, "cuda")}
        for name, expected in (("ours (sparse projections)", "sparse"), ("ours (dense projections)", "dense")):
            chosen.clear()
            found[name].run()
            assert chosen == [expected] * 2


def test_counts_are_those_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert all(table in page for table in gpu_counts.tables().split("\n\n"))


def test_projections_of_active_heads_save_four_of_six_products():
    def of_projections(**options):
        dense, sparse = (
            gpu_counts.layer_operations(2048, attention=0.5, sparse=sparse, **options) for sparse in (False, True)
        )
        return (dense - sparse) / (2 * 4096 * 4096 * gpu_counts.SHARE)

    assert of_projections(backward=False) == 1 and of_projections(backward=True) == 4


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
