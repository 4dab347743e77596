"""Compiles the C++ sources for this machine, once: a cache directory per sources, compiler, torch and processor."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "moh_cpu.so"

FLAGS = (
    "-O3",
    "-fopenmp",
    # Also where a compiler's default is not to fuse a * b + c: the kernels are written for it.
    "-ffp-contract=fast",
)

_AVX512 = ("avx2", "fma3", "f16c", "bmi2", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16")

# Instruction sets beyond the portable one: source file in `csrc/isa` -> what torch calls the features it needs.
INSTRUCTION_SETS = {
    "avx2": ("avx2", "fma3", "f16c", "bmi2"),
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "amx_tile", "amx_bf16"),
}

# The kernels for AMX on tiles in memory, to test them anywhere; built if MOH_CPU_IMITATE_AMX=1.
IMITATION, IMITATION_NEEDS = "amx_imitated", _AVX512_BF16


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


def cache_directory() -> Path:
    """Where compiled kernels are kept: `$MOH_CACHE_DIR`, or `moh` in the user's cache directory."""
    chosen = os.environ.get("MOH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moh"


def supported_instruction_sets() -> list[str]:
    """Names of the instruction sets, the portable one aside, that this processor runs."""
    capabilities = torch.cpu.get_capabilities()
    sets = dict(INSTRUCTION_SETS)
    if os.environ.get("MOH_CPU_IMITATE_AMX") == "1":
        sets[IMITATION] = IMITATION_NEEDS
    return [name for name, needed in sets.items() if all(capabilities.get(key) for key in needed)]


def compile_kernels() -> Path:
    """The compiled library, from the cache or built now (up to a minute); safe in several processes at once.

    Raises:
        BuildError: there is no compiler, it failed, or the cache directory can't be written.
    """
    command = os.environ.get("CXX") or "g++"
    compiler = shutil.which((shlex.split(command) or [command])[0])
    if compiler is None:
        raise BuildError(f"the C++ compiler {command!r} was not found (set CXX to name another)")
    sets = supported_instruction_sets()
    directory = cache_directory() / "cpu" / _key(compiler, sets)
    library = directory / LIBRARY
    if library.exists():
        _check_owner(library)
        return library
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # The lock prevents a second build; it ends with its process, so a killed one blocks no other.
        with FileLock(f"{directory}.lock"):
            if not library.exists():
                _build_into(directory, command, sets)
        _check_owner(library)
    except OSError as error:
        raise BuildError(f"{directory.parent} can't be written: {error}; set MOH_CACHE_DIR to another place") from error
    return library


def _check_owner(library: Path) -> None:
    """Check that nobody else could have put the library there: loading it runs it.

    Raises:
        BuildError: it or its directory is a link, belongs to another user than this one or root, or others may write there.
    """
    if not hasattr(os, "getuid"):
        return
    for path in (library.parent, library):
        found = path.lstat()
        # in a directory that others can't write to, the mode of the file itself does not matter
        open_to_others = path.is_dir() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if path.is_symlink() or found.st_uid not in (os.getuid(), 0) or open_to_others:
            raise BuildError(
                f"the compiled kernels in {path} are not loaded, because another user could have put them there: delete "
                f"{library.parent}, or set MOH_CACHE_DIR to a directory of your own"
            )


def _flags() -> list[str]:
    """Ours and those of `$MOH_CPU_FLAGS`, which come last and so win: for sanitizers and experiments."""
    return [*FLAGS, *shlex.split(os.environ.get("MOH_CPU_FLAGS", ""))]


def _key(compiler: str, sets: list[str]) -> str:
    """Differs wherever a library built in one place could be wrong in another."""
    key = hashlib.sha256()
    for file in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        key.update(file.relative_to(SOURCES).as_posix().encode() + file.read_bytes())
    file_of_compiler = Path(compiler).resolve().stat()
    features = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    for part in (
        torch.__version__,
        platform.machine(),
        os.environ.get("CXX"),  # it may have arguments
        compiler,
        file_of_compiler.st_size,
        file_of_compiler.st_mtime_ns,
        _flags(),
        sets,
        features,
    ):
        key.update(repr(part).encode())
    return key.hexdigest()[:16]


def _build_into(directory: Path, command: str, sets: list[str]) -> None:
    """Build next to `directory` and move the result there, so that no process sees half a library."""
    print("moh: compiling the CPU kernels for this machine (once, up to a minute) ...", file=sys.stderr, flush=True)
    # The portable kernels come before the others: where two of them hold the same inline function, the linker keeps the
    # first, and that one runs everywhere.
    kernels = [SOURCES / "isa" / f"{name}.cpp" for name in ("portable", *sets)]
    sources = [*kernels, *sorted((SOURCES / "operators").glob("*.cpp"))]
    work = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        with _compiler_environment(command):
            from torch.utils import cpp_extension

            # Loads the library too. It stays the same file when it is moved, so that loading it from its final place
            # again does nothing.
            cpp_extension.load(
                name="moh_cpu",
                sources=[str(source) for source in sources],
                extra_cflags=[*_flags(), *(f"-DMOH_{name.upper()}" for name in sets)],
                extra_ldflags=_flags(),
                extra_include_paths=[str(SOURCES)],
                build_directory=str(work),
                with_cuda=False,
                is_python_module=False,
            )
        next(work.glob("*.so")).rename(work / LIBRARY)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(work, directory)
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
        text, log = str(error) or repr(error), Path(f"{directory}.log")
        if isinstance(error, subprocess.CalledProcessError):  # the compiler can't even report its version
            text += f"\n{(error.output or b'').decode(errors='replace')}"
        log.write_text(text, encoding="utf-8")
        first = next((line for line in text.splitlines() if "error:" in line.lower()), text.splitlines()[0])
        raise BuildError(f"{first.strip()} (all of it: {log})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _compiler_environment(command: str) -> Iterator[None]:
    """With this compiler, ninja from its package even if the virtual environment is not activated, and no notes on CUDA."""
    import ninja

    before = {name: os.environ.get(name) for name in ("PATH", "CXX")}
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, before["PATH"] or ""])
    os.environ["CXX"] = command
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        logger.setLevel(level)
