"""Backend `triton`: kernels that gather the active queries themselves; NVIDIA GPUs from sm_80 on.

On the CPU only in Triton's interpreter (`TRITON_INTERPRET=1`), for checks. Triton is imported at the first call,
so it may be missing.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from moh.attention.call import Call, unsupported_dtype, unsupported_options
from moh.attention.gpu.operators import triton_attention_op
from moh.attention.gpu.tiles import MAX_WIDTH
from moh.attention.rows import pack

MIN_CAPABILITY = (8, 0)


def attend(call: Call) -> Tensor:
    """Routed attention by the Triton kernels."""
    packing = pack(call.gates.detach(), call.k.shape[1])
    rows, counts, before = (x.to(torch.int32).contiguous() for x in (packing.rows, packing.counts, packing.before))
    attn_mask = None if call.attn_mask is None else call.attn_mask.detach()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    out: Tensor = triton_attention_op(
        q, k, v, call.gates, attn_mask, rows, counts, before, call.is_causal, None, call.scale
    )[0]
    return out


@torch.compiler.assume_constant_result
def unavailable(device: str = "cuda") -> str | None:
    """Why the kernels can't run on devices of this type ("cuda" or "cpu") here, or None."""
    return _unavailable(device)


@functools.cache
def _unavailable(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA wheels"
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu":
        return None if interprets else "it runs on NVIDIA GPUs, and on the CPU only with TRITON_INTERPRET=1"
    if device != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.cuda is None:
        return "it was made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability {_dotted(MIN_CAPABILITY)} or later, this GPU has {_dotted(capability)}"
    return None


def not_interpreted(device: str, dtype: torch.dtype) -> str | None:
    """Why numbers of this dtype can't be computed on this device by Triton's interpreter, or None."""
    return "Triton's interpreter can't multiply bfloat16" if device == "cpu" and dtype == torch.bfloat16 else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def why_not(call: Call) -> str | None:
    """Why the backend can't handle the call, or None."""
    q, v = call.q, call.v
    reason: str | None = unavailable(q.device.type)
    if reason is not None:
        return reason
    if (reason := unsupported_dtype(q)) is not None:
        return reason
    width = max(q.shape[-1], v.shape[-1])
    if width > MAX_WIDTH:
        return f"it supports heads of width up to {MAX_WIDTH}, not {width}"
    if min(q.shape) == 0 or min(v.shape) == 0:
        return "it needs at least one query and one key"
    if (reason := not_interpreted(q.device.type, q.dtype)) is not None:
        return reason
    return unsupported_options(call.attn_mask, call.dropout_p)
