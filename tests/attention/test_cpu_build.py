"""Promises of the kernels' build: a failure gives a clear reason and `sdpa`; the cache is never wrong or half made."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

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
    assert {file.suffix for file in left} <= {".log", ".lock", ".failed"}
    (log,) = (file for file in left if file.suffix == ".log")
    assert "more words" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "error",
    ["clang: error: unsupported option '-fopenmp'", "ParallelOpenMP.h:12:10: fatal error: 'omp.h' file not found"],
    ids=["Apple's clang", "clang without libomp"],
)
def test_compiler_without_openmp_is_named_so_with_the_remedy(cache, tmp_path, monkeypatch, error):
    compiler(tmp_path, monkeypatch, f'{TELLS_ITS_VERSION}\necho "{error}" >&2; exit 1')
    message = fail_to_compile()
    assert error in message and "this compiler has no OpenMP: install it (libomp), or let CXX name another" in message


def test_compiler_that_fails_in_silence_is_not_said_to_lack_openmp(cache, tmp_path, monkeypatch):
    compiler(
        tmp_path, monkeypatch, f"{TELLS_ITS_VERSION}\nexit 1"
    )  # the command, with -fopenmp, is all that there is to say
    assert "no OpenMP" not in fail_to_compile()


def test_compiler_that_makes_nothing_is_a_failed_build(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(BuildError):
        compile_kernels()
    assert {file.suffix for file in (cache / "cpu").iterdir()} <= {".log", ".lock", ".failed"}


def counting(folder: Path, script: str) -> str:
    return f"echo called >> '{folder}/calls'; {script}"


def calls(folder: Path) -> int:
    """How often the compiler was called since the last time."""
    file = folder / "calls"
    number = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
    file.unlink(missing_ok=True)
    return number


def fail_to_compile() -> str:
    with pytest.raises(BuildError) as error:
        compile_kernels()
    return str(error.value)


def test_failed_build_is_remembered_with_its_reason_and_how_to_try_again(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, counting(tmp_path, BURNING))
    first = fail_to_compile()
    assert calls(tmp_path) > 0
    again = fail_to_compile()
    assert calls(tmp_path) == 0
    assert again.startswith(first) and "the disk is on fire" in first
    (failure,) = (cache / "cpu").glob("*.failed")
    assert again.endswith(f"an earlier process tried, to try again delete {failure}")
    failure.unlink()
    assert fail_to_compile() == first
    assert calls(tmp_path) > 0


@pytest.mark.parametrize("change", ["compiler", "flag", "source", "environment"])
def test_failed_build_is_tried_again_with_another_compiler_flag_source_or_environment(
    cache, tmp_path, monkeypatch, change
):
    compiler(tmp_path, monkeypatch, counting(tmp_path, BURNING))
    fail_to_compile()
    assert calls(tmp_path) > 0
    if change == "environment":
        monkeypatch.setattr(torch, "__file__", "/elsewhere/torch/__init__.py")
    else:
        {"compiler": another_compiler, "flag": another_flag, "source": another_source}[change](monkeypatch, tmp_path)
    fail_to_compile()
    assert calls(tmp_path) > 0


@pytest.mark.parametrize("words", ["No space left on device", "Killed signal terminated program cc1plus"])
def test_failure_that_passes_is_not_remembered(cache, tmp_path, monkeypatch, words):
    compiler(tmp_path, monkeypatch, counting(tmp_path, f"{TELLS_ITS_VERSION}\necho 'error: {words}' >&2; exit 1"))
    for _ in range(2):
        assert words in fail_to_compile()
        assert calls(tmp_path) > 0


BUILD_TWICE = """
import os, sys
from moh.attention.cpu.build import compile_kernels
second = os.fork() == 0
os.dup2(os.open(f"{sys.argv[1]}/here-{int(second)}", os.O_CREAT | os.O_WRONLY), 2)
try:
    compile_kernels()
finally:
    second or os.wait()
"""


def test_process_that_waited_for_a_failed_build_does_not_repeat_it(forks, cache, tmp_path, monkeypatch):
    # The first one compiles until both have come as far, and a moment longer
    both = f"until [ $(ls {tmp_path}/here-* | wc -l) = 2 ]; do sleep 0.05; done; sleep 0.3"
    compiler(tmp_path, monkeypatch, counting(tmp_path, f"{TELLS_ITS_VERSION}\n{both}; {BURNING}"))
    assert forks.run(BUILD_TWICE, tmp_path).returncode == 1
    errors = [(tmp_path / f"here-{number}").read_text() for number in (0, 1)]
    assert all("the disk is on fire" in error for error in errors), errors
    assert sum("compiling the CPU kernels" in error for error in errors) == 1
    assert sum("an earlier process tried" in error for error in errors) == 1
    assert sum("waiting for another process that compiles the CPU kernels" in error for error in errors) == 1


def test_directory_that_a_killed_build_left_is_removed_by_the_next(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, BURNING)
    left = put_library(cache).parent
    left.rename(f"{left}.abc.building")
    fail_to_compile()
    assert not list((cache / "cpu").glob("*.building"))


@pytest.mark.parametrize("missing", [["avx512_bf16"], ["amx", "amx_imitated"], ["avx2", "avx512"]], ids="-".join)
def test_instruction_set_that_the_compiler_does_not_know_is_left_out_alone(tmp_path, monkeypatch, capsys, missing):
    targets = {
        "avx512_bf16": "_mm512_dpbf16_ps",
        "avx2": "vector_size(32)",
        "avx512": "vector_size(64)",
        "amx": "tdpbf16ps",
    }
    words = "\\|".join(targets.get(name, "nothing") for name in missing)
    compiler(
        tmp_path, monkeypatch, f"grep -q '{words}' \"$(echo \"$@\" | grep -o '[^ ]*probe.cpp')\" && exit 1; exit 0"
    )
    sets = [*build.INSTRUCTION_SETS, build.IMITATION]
    known = build._buildable(os.environ["CXX"], sets)
    gone = {name for name in sets if name in missing} - {"amx_imitated"}
    if "avx512_bf16" in missing:
        gone |= {"amx", "amx_imitated"}  # they need its products
    assert known == [name for name in sets if name not in gone]
    assert all(name in capsys.readouterr().err for name in list(gone)[:1])


def test_path_of_torch_with_a_space_reaches_the_linker_in_one_piece(cache, tmp_path, monkeypatch):
    libraries = tmp_path / "a b" / "torch" / "lib"
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(libraries))
    compiles = (
        'case "$*" in *" -c "*) for x; do case "$last" in -MF | -o) : > "$x";; esac; last=$x; done; exit 0;; esac'
    )
    links = f"printf '%s\\n' \"$@\" > '{tmp_path}/linked'; exit 1"
    compiler(tmp_path, monkeypatch, f"{TELLS_ITS_VERSION}\n{compiles}\n{links}")
    fail_to_compile()
    assert f"-L{libraries}" in (tmp_path / "linked").read_text(encoding="utf-8").splitlines()
    assert str(libraries) == cpp_extension.TORCH_LIB_PATH


def test_library_that_was_built_but_does_not_load_is_reported_with_the_reason(cache, tmp_path, monkeypatch):
    writes = 'for x; do case "$last" in -MF) : > "$x";; -o) echo text > "$x";; esac; last=$x; done'
    compiler(tmp_path, monkeypatch, f"{TELLS_ITS_VERSION}\n{writes}")
    with pytest.raises(BuildError, match=r"moh_cpu\S*\.so: .*(too short|invalid ELF|not a mach-o)"):
        compile_kernels()


@needs_compiler
def test_instruction_sets_of_the_machine_are_known_to_its_compiler(monkeypatch):
    for name in ("CXX", "MOH_CPU_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    sets = build.supported_instruction_sets()
    assert build._buildable("g++", sets) == sets
    if shutil.which("clang++"):
        assert build._buildable("clang++", sets) == sets


def test_switched_off_kernels_are_neither_built_nor_warned_of(cache, monkeypatch):
    monkeypatch.setenv("MOH_CPU_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (attend() == 2).all()
    assert cpu.unavailable() == "switched off by MOH_CPU_KERNELS=0"
    assert not cache.exists()


def test_user_without_a_home_is_told_of_the_variable(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    for name in ("MOH_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert_sdpa_serves_after_one_warning("this user has no home directory for them; set MOH_CACHE_DIR to a directory")


@pytest.mark.parametrize("operation", ["exists", "mkdir"])
def test_cache_of_another_user_is_named_with_the_remedy(cache, tmp_path, monkeypatch, operation):
    compiler(tmp_path, monkeypatch)
    allowed = getattr(Path, operation)

    def refused(path: Path, *args: object, **options: object) -> object:
        if cache in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *args, **options)

    monkeypatch.setattr(Path, operation, refused)
    assert_sdpa_serves_after_one_warning(
        r"cache/cpu can't be written: .*Permission denied.*; set MOH_CACHE_DIR to another"
    )


def test_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    cache.write_text("a file, not a directory", encoding="utf-8")
    assert_sdpa_serves_after_one_warning(r"cache/cpu can't be written: .*; set MOH_CACHE_DIR to another place")


def put_library(cache: Path) -> Path:
    """Writes a file that is not a library where this machine's library would be cached; returns its path."""
    program = os.environ["CXX"]
    key = f"{build._key(build.supported_instruction_sets())}-{build._compiler_key(program)}"
    library = cache / "cpu" / key / LIBRARY
    library.parent.mkdir(parents=True)
    library.write_text("not a library", encoding="utf-8")
    return library


def test_cached_library_is_used_without_the_compiler(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f"touch {tmp_path}/called")
    library = put_library(cache)
    assert compile_kernels() == library
    assert not (tmp_path / "called").exists()


def test_cached_library_for_this_processor_is_used_where_there_is_no_compiler(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    library = put_library(cache)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert compile_kernels() == library
    without_avx512(monkeypatch, tmp_path)
    with pytest.raises(BuildError, match="'/nowhere/g\\+\\+' was not found"):
        compile_kernels()


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
    assert_sdpa_serves_after_one_warning(
        "could not be built: OSError: .*moh_cpu.so: .*(too short|invalid ELF|not a mach-o)"
    )


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


def test_instruction_set_is_chosen_by_the_environment_and_checked(kernels, forks, monkeypatch):
    code = "from moh.attention import cpu; print(cpu.unavailable(), cpu.instruction_set())"
    monkeypatch.setenv("MOH_CPU_ISA", "portable")
    assert forks.run(code).stdout.split() == ["None", "portable"]
    monkeypatch.setenv("MOH_CPU_ISA", "sse9")
    done = forks.run(code)
    best = cpu.instruction_sets()[0]
    assert done.stdout.split() == ["None", best]
    assert done.stderr.count("RuntimeWarning: MOH_CPU_ISA=sse9 is not an instruction set") == 1
    assert f"portable; {best} is used" in done.stderr


@pytest.mark.parametrize(
    "error, reason",
    [
        pytest.param(errno.ENOSPC, "alternate signal stack", id="signal-stack"),
        pytest.param(errno.EINVAL, "Linux refuses it: Invalid argument", id="old-kernel"),
        pytest.param(0, "its products are not right", id="granted"),
    ],
)
def test_instruction_sets_left_out_are_named_with_their_reason(kernels, monkeypatch, error, reason):
    sets = ["avx2", "avx512_bf16", "amx"]
    monkeypatch.setattr(backend, "supported_instruction_sets", lambda: sets)
    monkeypatch.setattr(backend, "instruction_sets", lambda: ["avx512_bf16", "portable"])
    monkeypatch.setattr(backend, "_request_tiles", lambda: error)
    reasons = cpu.instruction_sets_left_out()
    assert list(reasons) == ["avx2", "amx"]
    assert "can't build it" in reasons["avx2"] and reason in reasons["amx"]
