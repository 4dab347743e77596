"""Compiles the C++ sources for this machine, once: a cache directory per sources, compiler, torch and processor."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

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


class _CompilerError(BuildError):
    """The compiler or the linker failed.

    Attributes:
        log: all that they wrote.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


# What a compiler and its assembler have to manage for each, after the pragma of its source.
_FMA = "typedef float V __attribute__((vector_size({}))); V probe(V a, V b, V c) {{ return a * b + c; }}"
_DOT = "#include <immintrin.h>\n__m512 probe(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }"
_TILE = f'{_DOT}\n#if __has_include(<amxbf16intrin.h>)\nvoid tile() {{ asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }}\n#endif'
_PROBES = {
    "avx2": ("avx2.cpp", _FMA.format(32)),
    "avx512": ("avx512.cpp", _FMA.format(64)),
    "avx512_bf16": ("avx512_bf16.h", _DOT),
    "amx": ("avx512_bf16.h", _TILE),
    IMITATION: ("avx512_bf16.h", _DOT),
}

# Failures of a compiler that need not come again; others are remembered.
_PASSING = ("No space left", "out of memory", "Cannot allocate memory", "memory exhausted", "Killed", "Disk quota")


def cache_directory() -> Path:
    """Where compiled kernels are kept: `$MOH_CACHE_DIR`, or `moh` in the user's cache directory.

    Raises:
        BuildError: there is no home directory, and none of the variables names another.
    """
    chosen = os.environ.get("MOH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moh"
    except RuntimeError as error:  # a user without HOME and without an entry in the system's list, as in containers
        raise BuildError("this user has no home directory for them; set MOH_CACHE_DIR to a directory") from error


def supported_instruction_sets() -> list[str]:
    """Names of the instruction sets, the portable one aside, that this processor runs."""
    capabilities = torch.cpu.get_capabilities()
    sets = dict(INSTRUCTION_SETS)
    if os.environ.get("MOH_CPU_IMITATE_AMX") == "1":
        sets[IMITATION] = IMITATION_NEEDS
    return [name for name, needed in sets.items() if all(capabilities.get(key) for key in needed)]


def compile_kernels() -> Path:
    """The compiled library, from the cache or built now (up to a minute); safe in several processes at once.

    Without a compiler, one that was built for this processor by any compiler will do. A failure is remembered in the cache,
    so that it costs its time once: for these sources, compiler, flags and torch.

    Raises:
        BuildError: there is no compiler, it failed, now or in an earlier process, or the cache directory can't be written.
    """
    command = os.environ.get("CXX") or "g++"
    compiler = shutil.which((shlex.split(command) or [command])[0])
    sets = supported_instruction_sets()
    cache = cache_directory() / "cpu"
    try:
        if compiler is None:
            library = _newest(cache.glob(f"{_key(sets)}-*/{LIBRARY}"))
            if library is None:
                raise BuildError(f"the C++ compiler {command!r} was not found (set CXX to name another)")
        else:
            library = cache / f"{_key(sets)}-{_compiler_key(compiler)}" / LIBRARY
            if not library.exists():
                cache.mkdir(parents=True, exist_ok=True)
                # The lock prevents a second build; it ends with its process, so a killed one blocks no other.
                with _lock(Path(f"{library.parent}.lock")):
                    if not library.exists():
                        _build_unless_it_failed(library.parent, command, sets)
        _check_owner(library)
    except OSError as error:
        raise BuildError(f"{cache} can't be written: {error}; set MOH_CACHE_DIR to another place") from error
    return library


def _newest(libraries: Iterable[Path]) -> Path | None:
    return max(libraries, key=lambda library: library.stat().st_mtime, default=None)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("moh: waiting for another process that compiles the CPU kernels ...", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_unless_it_failed(directory: Path, command: str, sets: list[str]) -> None:
    """`_build_into`, but only once where it fails for good.

    Raises:
        BuildError: it fails or has failed.
    """
    # Beside the key, where torch is: a failure may be that environment's.
    place = hashlib.sha256(torch.__file__.encode()).hexdigest()[:8]
    failure = Path(f"{directory}.{place}.failed")
    if failure.exists():
        raise BuildError(
            f"{failure.read_text(encoding='utf-8')}; an earlier process tried, to try again delete {failure}"
        )
    try:
        _build_into(directory, command, sets)
    except _CompilerError as error:
        if not any(words in error.log for words in _PASSING):
            failure.write_text(str(error), encoding="utf-8")
        raise


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


def _key(sets: list[str]) -> str:
    """Differs wherever a library built in one place could be wrong in another, the compiler aside."""
    key = hashlib.sha256()
    for file in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        key.update(file.relative_to(SOURCES).as_posix().encode() + file.read_bytes())
    features = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    for part in (torch.__version__, platform.machine(), _flags(), sets, features):
        key.update(repr(part).encode())
    return key.hexdigest()[:16]


def _compiler_key(compiler: str) -> str:
    file = Path(compiler).resolve().stat()
    parts = (os.environ.get("CXX"), compiler, file.st_size, file.st_mtime_ns)  # CXX may have arguments
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _buildable(command: str, sets: list[str]) -> list[str]:
    """The instruction sets that the compiler and its assembler know; what they don't is reported."""
    known = []
    for name in sets:
        file, text = _PROBES[name]
        pragma = re.search(
            r"#pragma GCC target.*\n#ifdef __clang__\n.*\n#endif\n", (SOURCES / "isa" / file).read_text()
        )
        assert pragma is not None, file
        with tempfile.TemporaryDirectory() as scratch:
            probe = Path(scratch, "probe.cpp")
            probe.write_text(f'{pragma[0]}{text}\n#include "isa/target_end.h"\n', encoding="utf-8")
            made = probe.with_suffix(".o")
            arguments = [*shlex.split(command), *_flags(), f"-I{SOURCES}", "-c", str(probe), "-o", str(made)]
            if subprocess.run(arguments, capture_output=True, check=False).returncode == 0:
                known.append(name)
    if left_out := [name for name in sets if name not in known]:
        print(f"moh: {command} can't compile for {', '.join(left_out)}: left out", file=sys.stderr, flush=True)
    return known


def _build_into(directory: Path, command: str, sets: list[str]) -> None:
    """Build next to `directory` and move the result there, so that no process sees half a library."""
    print("moh: compiling the CPU kernels for this machine (once, up to a minute) ...", file=sys.stderr, flush=True)
    for left in directory.parent.glob(f"{directory.name}.*.building"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".building", dir=directory.parent))
    try:
        sets = _buildable(command, sets)
        # The portable kernels come before the others: where two of them hold the same inline function, the linker keeps
        # the first, and that one runs everywhere.
        kernels = [SOURCES / "isa" / f"{name}.cpp" for name in ("portable", *sets)]
        sources = [*kernels, *sorted((SOURCES / "operators").glob("*.cpp"))]
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
        text, log = in_words(error), Path(f"{directory}.log")
        if isinstance(error, subprocess.CalledProcessError):  # the compiler can't even report its version
            text += f"\n{(error.output or b'').decode(errors='replace')}"
        log.write_text(text, encoding="utf-8")
        first = next((line for line in text.splitlines() if "error:" in line.lower()), text.splitlines()[0])
        message = f"{first.strip()} (all of it: {log})"
        # not in torch's own first line, which has the whole command
        if "error:" in first.lower() and re.search(r"\bomp\.h\b|'-fopenmp", first):
            message += (
                "; this compiler has no OpenMP: install it (libomp), or let CXX name another compiler, such as g++"
            )
        if isinstance(error, (ImportError, OSError)):  # ninja is missing, a file can't be written
            raise BuildError(message) from error
        raise _CompilerError(message, text) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def in_words(error: Exception) -> str:
    """The error in words; where a library can't be loaded, only the error's cause says why."""
    text = str(error) or repr(error)
    return f"{text}: {error.__cause__}" if isinstance(error.__cause__, OSError) else text


@contextlib.contextmanager
def _compiler_environment(command: str) -> Iterator[None]:
    """With this compiler, ninja from its package even if the virtual environment is not activated, and no notes on CUDA.

    PyTorch hands the path of its libraries to the linker without quotes, which a path with a space needs.
    """
    import ninja
    from torch.utils import cpp_extension

    before = {name: os.environ.get(name) for name in ("PATH", "CXX")}
    logger = logging.getLogger("torch.utils.cpp_extension")
    level, libraries = logger.level, cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(libraries)
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
        cpp_extension.TORCH_LIB_PATH = libraries
