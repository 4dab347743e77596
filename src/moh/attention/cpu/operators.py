"""The compiled operators in PyTorch: loading on first use, shapes for `torch.compile`, the backend's function.

Not for the build (`build.py`) or the kernels (`csrc/`).
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from moh.attention.cpu import aggregated, projections
from moh.attention.cpu.build import BuildError, compile_kernels
from moh.attention.refusals import unserved_dtype, unserved_options

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
        reason = f"the C++ kernels could not be built: {error if isinstance(error, BuildError) else repr(error)}"
        warnings.warn(f"{reason}; the slower backend 'sdpa' is used", RuntimeWarning, stacklevel=2)
        return reason
    torch.library.register_fake("moh::cpu_attention", _attention_shapes)
    torch.library.register_fake("moh::cpu_attention_backward", _attention_backward_shapes)
    torch.library.register_fake("moh::cpu_decode_layer", _decode_layer_shape)
    projections.register()
    aggregated.register()
    chosen = os.environ.get("MOH_CPU_ISA")
    if chosen:
        _use(chosen)
    return None


def _attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    keep_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    B, H, Nq = q.shape[:3]
    return q.new_empty(B, Nq, H, v.shape[-1]), q.new_empty(B if keep_lse else 0, H, Nq, dtype=torch.float32)


def _attention_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *saved: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gates.new_empty(gates.shape)


def _decode_layer_shape(x: Tensor, *others: Any) -> Tensor:
    o_weight: Tensor = others[11]
    return x.new_empty(*x.shape[:2], o_weight.shape[0])


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


def _require() -> None:
    reason = _load()
    if reason is not None:
        raise BuildError(reason)


def unavailable() -> str | None:
    """Why the kernels can't be used on this machine, or None; compiles them if that was not yet tried."""
    reason: str | None = _load()
    return reason


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """Why the backend can't serve the call, or None; compiles the kernels if nothing else stands against it."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if (reason := unserved_dtype(q)) is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"it has heads of width at most {MAX_WIDTH}, not {max(q.shape[-1], v.shape[-1])}"
    if (reason := unserved_options(attn_mask, dropout_p)) is not None:
        return reason
    return unavailable()


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """Routed attention by the C++ kernels; arguments and result as in `moh.attention.moh_attention`."""
    if attn_mask is not None:
        attn_mask = attn_mask.detach()
    # For gradients the operator keeps the log-sum-exp whatever it is told.
    out: Tensor = torch.ops.moh.cpu_attention(
        q, k, v, gates, attn_mask, is_causal, sliding_window, scale, keep_lse=False
    )[0]
    return out
