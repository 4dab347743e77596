"""Backend `cpu`: C++ kernels, built and loaded on first use, and the instruction sets that they may use."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import warnings

import torch
from torch import Tensor

from moh.attention.call import Call, unsupported_dtype, unsupported_options
from moh.attention.cpu.build import BuildError, compile_kernels, in_words, supported_instruction_sets
from moh.attention.cpu.operators import register

MAX_WIDTH = 256

_state: dict[str, str | None] = {}  # "reason" once loading was tried: why there are no kernels, None if there are
_lock = threading.Lock()


@torch.compiler.assume_constant_result
def _load() -> str | None:
    with _lock:
        if "reason" not in _state:
            _state["reason"] = _try_to_load()
        return _state["reason"]


def _try_to_load() -> str | None:
    if os.environ.get("MOH_CPU_KERNELS", "1") == "0":
        return "switched off by MOH_CPU_KERNELS=0"
    try:
        torch.ops.load_library(compile_kernels())
    except Exception as error:  # whatever it is, attention still works without the kernels
        said = str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {in_words(error)}"
        reason = f"the C++ kernels could not be built: {said}"
        warnings.warn(f"{reason}; the slower backend 'sdpa' is used", RuntimeWarning, stacklevel=2)
        return reason
    register()
    known = torch.ops.moh.cpu_instruction_sets()  # asks for AMX now, while there are few threads: see `_request_tiles`
    chosen = os.environ.get("MOH_CPU_ISA")
    if chosen and chosen in known:
        _use(chosen)
    elif chosen:
        warnings.warn(
            f"MOH_CPU_ISA={chosen} is not an instruction set of this machine's kernels, which are {', '.join(known)}; "
            f"{known[0]} is used",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def instruction_sets() -> list[str]:
    """Instruction sets of the compiled kernels, the most capable first.

    Raises:
        BuildError: there are no kernels.
    """
    _require()
    names: list[str] = torch.ops.moh.cpu_instruction_sets()
    return names


def instruction_set() -> str:
    """The instruction set in use: the most capable, unless another was chosen.

    Raises:
        BuildError: there are no kernels.
    """
    _require()
    name: str = torch.ops.moh.cpu_in_use()
    return name


def use_instruction_set(name: str) -> None:
    """Use the kernels of another instruction set from now on, to test or to compare (also: `MOH_CPU_ISA=name`).

    Raises:
        ValueError: this machine's build has no such instruction set.
        BuildError: there are no kernels.
    """
    _require()
    _use(name)


def _use(name: str) -> None:
    known = torch.ops.moh.cpu_instruction_sets()
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(map(repr, known))} on this machine, got {name!r}")
    torch.ops.moh.cpu_use_instruction_set(name)


def instruction_sets_left_out() -> dict[str, str]:
    """Why the kernels can't use instruction sets that this processor has, by name.

    Raises:
        BuildError: there are no kernels.
    """
    known = instruction_sets()
    reasons = {name: "the compiler or its assembler can't build it" for name in supported_instruction_sets()}
    if "amx" in reasons and "avx512_bf16" in known:
        reasons["amx"] = _why_no_tiles()
    return {name: reason for name, reason in reasons.items() if name not in known}


def _why_no_tiles() -> str:
    error = _request_tiles()
    if error == errno.ENOSPC:
        return "Linux refuses it, as a thread has an alternate signal stack too small for it: import moh and use it before that"
    if error:
        return f"Linux refuses it: {os.strerror(error)}"
    return "its products are not right, or the compiler or its assembler can't build it"


def _request_tiles() -> int:
    """Ask Linux for AMX's tiles, as the kernels do when they are loaded; returns the error's number, 0 if it grants them.

    It does so for all threads or none: not if one has an alternate signal stack of a size from before AMX (8 KiB).
    """
    request, tiles = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XTILEDATA
    arch_prctl = 158
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(arch_prctl, request, tiles) != 0 else 0


def _require() -> None:
    reason = _load()
    if reason is not None:
        raise BuildError(reason)


def unavailable() -> str | None:
    """Why the kernels can't be used on this machine, or None; compiles them if that was not yet tried."""
    reason: str | None = _load()
    return reason


def why_not(call: Call) -> str | None:
    """Why the backend can't handle the call, or None; compiles the kernels if there is no other reason."""
    q, v = call.q, call.v
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if (reason := unsupported_dtype(q)) is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"it supports heads of width up to {MAX_WIDTH}, not {max(q.shape[-1], v.shape[-1])}"
    if (reason := unsupported_options(call.attn_mask, call.dropout_p)) is not None:
        return reason
    return unavailable()


def attend(call: Call) -> Tensor:
    """Routed attention by the C++ kernels."""
    attn_mask = None if call.attn_mask is None else call.attn_mask.detach()
    # For gradients the operator keeps what the softmax leaves whatever `keep_softmax` is.
    out: Tensor = torch.ops.moh.cpu_attention(
        call.q, call.k, call.v, call.gates, attn_mask, call.is_causal, None, call.scale, keep_softmax=False
    )[0]
    return out
