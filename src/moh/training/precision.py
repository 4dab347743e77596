"""Which number format to train in: bfloat16 autocast where the machine is faster with it, float32 elsewhere.

The transformers Trainer does the mixed precision itself; `without_autocast` ends it after training.
"""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import nn

Precision = Literal["bf16", "fp32"]

_SIZE = 384  # of the square matrices: a few milliseconds even where bfloat16 is emulated, and a fair sample
_WORTH = 1.2  # bfloat16 has to be this much faster: the casts around a matrix product take time too


def choose_precision(device: torch.device | None = None) -> Precision:
    """ "bf16" or "fp32", for `device` (None: the GPU if there is one).

    On a GPU, bfloat16 if supported. On a CPU both are timed, in a few milliseconds: some CPUs have bfloat16
    instructions, others emulate it, ten times slower than float32.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if _seconds(torch.bfloat16) * _WORTH < _seconds(torch.float32) else "fp32"


def without_autocast(model: nn.Module) -> nn.Module:
    """`model` with its own `forward` again, without the autocast that accelerate wraps around it.

    A trained model then computes like one that was saved and loaded. accelerate's own `keep_fp32_wrapper=False` also
    removes the decorators of transformers' models, and binds what is left twice (1.15).
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original  # the instance had its own `forward` before
    return model


def _seconds(dtype: torch.dtype) -> float:
    """Shortest of five timings of a matrix product on the CPU."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one prepares the kernel
