"""Promises of the kernels' build: a failure gives a clear reason and `sdpa`; the cache is never wrong or half made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from moh.attention import Call, choose_backend, cpu, moh_attention
from moh.attention.cpu import backend, build
from moh.attention.cpu.build import LIBRARY, BuildError, compile_kernels

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no build tried yet, and none of the user's settings."""
    for name in ("MOH_CPU_KERNELS", "MOH_CPU_ISA", "MOH_CPU_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "_state", {})
    return tmp_path / "cache"


BURNING = "echo 'some-compiler: error: the disk is on fire' >&2; echo 'more words' >&2; exit 1"
TELLS_ITS_VERSION = 'case "$*" in -v | --version | -dump*) echo "g++ (GCC) 13.2.0"; exit 0;; esac'


def compiler(folder: Path, monkeypatch, script: str = "exit 1") -> Path:
    """A program that replaces the compiler."""
    file = folder / "some-compiler"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    return file


def attend(**options: object) -> torch.Tensor:
    q, k, v = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), 2.0)
    return moh_attention(q, k, v, torch.ones(1, 3, 2), **options)


def assert_sdpa_serves_after_one_warning(reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert (attend() == 2).all()
    assert len(caught) == 1
    assert "the slower backend 'sdpa' is used" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (attend() == 2).all()
    q = torch.ones(1, 2, 3, 4)
    assert choose_backend(Call(q, q, q, torch.ones(1, 3, 2))).name == "sdpa"
    with pytest.raises(ValueError, match=f"backend 'cpu' can't handle this call: .*{reason}"):
        attend(backend="cpu")
    with pytest.raises(BuildError, match=reason):
        cpu.instruction_sets()


def test_without_a_compiler_sdpa_serves_and_one_warning_names_it(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert_sdpa_serves_after_one_warning(r"the C\+\+ compiler '/nowhere/g\+\+' was not found \(set CXX")
    assert not cache.exists()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(BURNING, id="cannot-even-start"),
        pytest.param(f"{TELLS_ITS_VERSION}\n{BURNING}", id="cannot-compile"),
    ],
)
def test_broken_compiler_leaves_its_reason_and_a_log_and_no_half_made_library(cache, tmp_path, monkeypatch, script):
    compiler(tmp_path, monkeypatch, script)
    assert_sdpa_serves_after_one_warning(r"error: the disk is on fire \(all of it: .*\.log\)")
    left = sorted((cache / "cpu").iterdir())
    assert {file.suffix for file in left} <= {".log", ".lock"}
    (log,) = (file for file in left if file.suffix == ".log")
    assert "more words" in log.read_text(encoding="utf-8")


def test_compiler_that_makes_nothing_is_a_failed_build(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(BuildError):
        compile_kernels()
    assert {file.suffix for file in (cache / "cpu").iterdir()} <= {".log", ".lock"}


def test_failed_build_is_tried_again_by_the_next_process(cache, tmp_path, monkeypatch):
    file = compiler(tmp_path, monkeypatch, f"echo called >> {tmp_path}/calls; exit 1")
    for _ in range(2):
        (tmp_path / "calls").unlink(missing_ok=True)
        with pytest.raises(BuildError):
            compile_kernels()
        assert (tmp_path / "calls").exists(), file


def test_switched_off_kernels_are_neither_built_nor_warned_of(cache, monkeypatch):
    monkeypatch.setenv("MOH_CPU_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (attend() == 2).all()
    assert cpu.unavailable() == "switched off by MOH_CPU_KERNELS=0"
    assert not cache.exists()


def test_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    cache.write_text("a file, not a directory", encoding="utf-8")
    assert_sdpa_serves_after_one_warning(r"cache/cpu can't be written: .*; set MOH_CACHE_DIR to another place")


def put_library(cache: Path) -> Path:
    """Writes a file that is not a library where this machine's library would be cached; returns its path."""
    program = os.environ["CXX"]
    library = cache / "cpu" / build._key(program, build.supported_instruction_sets()) / LIBRARY
    library.parent.mkdir(parents=True)
    library.write_text("not a library", encoding="utf-8")
    return library


def test_cached_library_is_used_without_the_compiler(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f"touch {tmp_path}/called")
    library = put_library(cache)
    assert compile_kernels() == library
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("how", ["writable", "linked", "linked directory", "of another user"])
def test_cached_library_that_another_user_could_have_put_there_is_not_loaded(cache, tmp_path, monkeypatch, how):
    compiler(tmp_path, monkeypatch)
    library = put_library(cache)
    if how == "writable":
        library.parent.chmod(0o777)
    elif how == "of another user":
        monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
        os.chown(library, library.stat().st_uid or 4321, -1)
    else:
        moved = library if how == "linked" else library.parent
        moved.rename(tmp_path / "elsewhere")
        moved.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match=r"another user could have put them there: delete .*, or set MOH_CACHE_DIR"):
        compile_kernels()


def test_cached_library_that_cannot_be_loaded_is_a_reason_for_sdpa(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    put_library(cache)
    assert_sdpa_serves_after_one_warning("could not be built: .*moh_cpu.so")


def without_avx512(monkeypatch, tmp_path):
    known = torch.cpu.get_capabilities()
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {k: v for k, v in known.items() if not k.startswith("avx")}
    )


def another_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "9.9.9")


def another_source(monkeypatch, tmp_path):
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    with open(copy / "kernels" / "product.h", "a", encoding="utf-8") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", copy)


def another_compiler(monkeypatch, tmp_path):
    os.utime(os.environ["CXX"], (1, 1))


def another_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("MOH_CPU_FLAGS", "-O1")


def another_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(build.platform, "machine", lambda: "pdp11")


@pytest.mark.parametrize(
    "change",
    [without_avx512, another_torch, another_source, another_compiler, another_flag, another_machine],
    ids=lambda change: change.__name__,
)
def test_library_built_for_something_else_is_never_used(cache, tmp_path, monkeypatch, change):
    compiler(tmp_path, monkeypatch, BURNING)
    library = put_library(cache)
    assert compile_kernels() == library
    change(monkeypatch, tmp_path)
    with pytest.raises(BuildError, match="the disk is on fire"):
        compile_kernels()


def test_sources_kept_elsewhere_with_the_same_text_are_the_same(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    library = put_library(cache)
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert compile_kernels() == library


USE_KERNELS = """
import torch
from moh.attention import cpu, moh_attention
q = torch.ones(1, 2, 3, 4)
assert (moh_attention(q, q, q, torch.ones(1, 3, 2), backend="cpu") == 1).all()
print(cpu.instruction_sets()[-1])
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_build_at_the_same_moment_both_work_and_leave_one_library(cache):
    cache.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", USE_KERNELS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in builds]
    assert [process.returncode for process in builds] == [0, 0], results
    assert [out.strip() for out, _ in results] == ["portable", "portable"]
    assert sum("compiling the CPU kernels" in err for _, err in results) == 1
    (directory,) = (path for path in (cache / "cpu").iterdir() if path.is_dir())
    assert [path.name for path in directory.glob("*.so")] == [LIBRARY]
    assert {path.suffix for path in (cache / "cpu").iterdir() if path.is_file()} <= {".lock"}


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_build_that_is_killed_leaves_nothing_that_the_next_one_stumbles_over(cache):
    killed = subprocess.Popen([sys.executable, "-c", USE_KERNELS], stderr=subprocess.PIPE, text=True)
    for line in killed.stderr:
        if "compiling the CPU kernels" in line:
            break
    killed.kill()
    killed.communicate()
    again = subprocess.run([sys.executable, "-c", USE_KERNELS], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == "portable"


def test_instruction_set_is_chosen_by_the_environment_and_checked(kernels):
    code = "from moh.attention import cpu; print(cpu.unavailable(), cpu.instruction_set())"
    environment = os.environ | {"MOH_CPU_ISA": "portable"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "portable"]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"MOH_CPU_ISA": "sse9"}, capture_output=True, text=True
    )
    assert "must be one of" in done.stderr and "'sse9'" in done.stderr
