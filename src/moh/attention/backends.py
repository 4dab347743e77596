"""`moh_attention`: one function over several backends, and the table that chooses between them.

The paper's weighted sum of heads, before the output projection. Not for checking the arguments (`arguments.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moh.attention import cpu, flex, triton_kernels
from moh.attention.arguments import check_arguments, check_limits
from moh.attention.compiled import packed_attention_compiled
from moh.attention.grouped import grouped_attention, without_limits
from moh.attention.packed import packed_attention
from moh.attention.reference import reference_attention


@dataclass(frozen=True)
class Backend:
    """One way to compute routed attention.

    Attributes:
        name: what `moh_attention(backend=...)` takes.
        description: one line for `moh info`.
        function: `(q, k, v, gates, *, is_causal, attn_mask, scale, dropout_p) -> [B, Nq, H, D]`, and `sliding_window`
            where `has_sliding_window`.
        unsupported: `(q, k, v, gates, attn_mask, dropout_p)` -> why it can't serve the call, or None if it can.
        has_sliding_window: whether it leaves out keys before the window itself; else it gets a mask.
        needs_limits: whether it works only with limits to what a token uses; `function` gets them then. `backend=None`
            chooses it by `heads_per_group` alone.
        chosen_on: types of device on which `backend=None` may choose it, None for all; others have to name it.
    """

    name: str
    description: str
    function: Callable[..., Tensor]
    unsupported: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], str | None]
    has_sliding_window: bool = False
    needs_limits: bool = False
    chosen_on: tuple[str, ...] | None = None


def _serves_all(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    return None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: object) -> Tensor:
    mask, dropout_p = options["attn_mask"], options["dropout_p"]
    if torch.compiler.is_compiling() and not dropout_p and not (isinstance(mask, Tensor) and mask.requires_grad):
        return packed_attention_compiled(q, k, v, gates, **options)  # type: ignore[arg-type]
    out: Tensor = _packed_eager(q, k, v, gates, **options)
    return out


@torch.compiler.disable  # the number of active rows decides the shapes
def _packed_eager(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: object) -> Tensor:
    return packed_attention(q, k, v, gates, **options)  # type: ignore[arg-type]


_BACKENDS = {
    backend.name: backend
    for backend in (
        # In order of preference: backend=None takes the first that supports the call.
        Backend("cpu", "C++ kernels, compiled on first use; CPU", cpu.cpu_attention, cpu.unsupported, True),
        Backend(
            "grouped",
            "PyTorch's own attention, for as many heads in every key/value group; any device",
            grouped_attention,
            _serves_all,
            needs_limits=True,
        ),
        Backend(
            "triton",
            "Triton kernels that gather active queries; NVIDIA GPUs",
            triton_kernels.triton_attention,
            triton_kernels.unsupported,
            True,
            chosen_on=("cuda",),
        ),
        Backend(
            "flex",
            "PyTorch's FlexAttention on the blocks that have work; GPUs, forward pass on the CPU",
            flex.flex_routed_attention,
            flex.unsupported,
            True,
            chosen_on=("cuda",),
        ),
        Backend("sdpa", "gathers active pairs around PyTorch's own attention; any device", _sdpa, _serves_all),
        Backend("reference", "the definition: every head, then weighted", reference_attention, _serves_all),
    )
}


def backends() -> list[Backend]:
    """All backends, the most preferred first."""
    return list(_BACKENDS.values())


def moh_attention(
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
    heads_per_group: int | None = None,
    groups_per_token: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which each token uses only some heads: `out[b, t, i] = gates[b, t, i] * H_i(x_t)`.

    Args:
        q: queries `[B, H, Nq, D]`.
        k: keys `[B, Hkv, Nk, D]` with `H % Hkv == 0`; query head i reads key/value head `i // (H // Hkv)`.
        v: values `[B, Hkv, Nk, Dv]`, usually Dv = D.
        gates: `[B, Nq, H]`, each head's weight for each token; exactly 0 means inactive, not computed.
        is_causal: query i sees keys 0 to i (aligned at the first query and key, as in
            `torch.nn.functional.scaled_dot_product_attention`); may be combined with `attn_mask`.
        attn_mask: broadcastable to `[B, H, Nq, Nk]`; bool (True = may be seen) or added to the scores.
        scale: factor of the scores; None means `1 / sqrt(D)`.
        dropout_p: probability of dropping an attention weight. As in PyTorch's function it is applied whenever it is
            above 0, so pass 0 in evaluation.
        sliding_window: query i sees at most this many keys, i itself the last; needs `is_causal`. None means all.
        heads_per_group: a promise that no token uses more than this many heads of one key/value head, from 1 to
            H / Hkv (`MoHConfig.heads_per_group`); other heads may be left out. None promises nothing.
        groups_per_token: a promise that no token uses more than this many key/value heads, likewise.
        backend: name of a backend, or None for the most preferred that supports the call.

    Returns:
        `[B, Nq, H, Dv]` in q's dtype (autocast's, inside `torch.autocast`), weighted by the gates, 0 where inactive,
        token-major so that the output projection reads it without a transpose. Differentiable in q, k, v, gates and
        an additive mask; the gradient of a gate that is 0 is defined as 0, since its head was never computed.
        A query that may see no key gives 0.

    Raises:
        ValueError: a shape, dtype, probability or backend name is not as above, or a named backend can't serve
            the call; the message says which and why.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as with PyTorch's own function
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, gates = q.to(dtype), k.to(dtype), v.to(dtype), gates.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    check_arguments(q, k, v, gates, attn_mask, dropout_p=dropout_p, is_causal=is_causal, sliding_window=sliding_window)
    if sliding_window is not None and sliding_window >= q.shape[2]:
        sliding_window = None  # no query has so many keys before it
    limits = {"heads_per_group": heads_per_group, "groups_per_token": groups_per_token}
    check_limits(q.shape[1], k.shape[1], **limits)
    chosen = choose_backend(q, k, v, gates, attn_mask=attn_mask, dropout_p=dropout_p, backend=backend, **limits)
    options: dict[str, Any] = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "dropout_p": dropout_p}
    if chosen.needs_limits:
        options |= limits
    if sliding_window is not None and chosen.has_sliding_window:
        options["sliding_window"] = sliding_window
    elif sliding_window is not None:
        options["attn_mask"] = _with_window(attn_mask, sliding_window, q, k.shape[2])
    return chosen.function(q, k, v, gates, **options)


def _with_window(attn_mask: Tensor | None, sliding_window: int, q: Tensor, Nk: int) -> Tensor:
    """`attn_mask` with the keys before each query's window taken away."""
    distance = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(Nk, device=q.device)  # [Nq, Nk]
    near = distance < sliding_window
    if attn_mask is None:
        return near
    return attn_mask & near if attn_mask.dtype == torch.bool else torch.where(near, attn_mask, -torch.inf)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    heads_per_group: int | None = None,
    groups_per_token: int | None = None,
    backend: str | None = None,
) -> Backend:
    """The backend that `moh_attention` would use for these arguments.

    Raises:
        ValueError: `backend` is unknown or can't serve the call.
    """

    limits = {"heads_per_group": heads_per_group, "groups_per_token": groups_per_token}
    if backend is None:
        return next(
            candidate
            for candidate in _BACKENDS.values()
            if _only_by_name(candidate, q.device.type, heads_per_group) is None
            and _why_not(candidate, (q, k, v, gates), attn_mask, dropout_p, **limits) is None
        )
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    if (why_not := _why_not(_BACKENDS[backend], (q, k, v, gates), attn_mask, dropout_p, **limits)) is not None:
        raise ValueError(f"backend {backend!r} can't serve this call: {why_not}")
    return _BACKENDS[backend]


def backends_passed_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    heads_per_group: int | None = None,
    groups_per_token: int | None = None,
) -> dict[str, str | None]:
    """Why `backend=None` would pass over each backend for these arguments; None if it would not: the first of those serves.

    The tensors may be empty views: only shapes, dtype, device and whether gradients are wanted count.
    """
    limits = {"heads_per_group": heads_per_group, "groups_per_token": groups_per_token}
    return {
        name: _why_not(candidate, (q, k, v, gates), attn_mask, dropout_p, **limits)
        or _only_by_name(candidate, q.device.type, heads_per_group)
        for name, candidate in _BACKENDS.items()
    }


def _only_by_name(candidate: Backend, device: str, heads_per_group: int | None) -> str | None:
    """Why a backend that could serve a call waits until it is named, or None."""
    if candidate.chosen_on is not None and device not in candidate.chosen_on:
        return f"on {device} it serves only calls that name it"
    if candidate.needs_limits and heads_per_group is None:
        return "with groups_per_token alone, it serves only calls that name it"
    return None


def _why_not(
    candidate: Backend,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    dropout_p: float,
    *,
    heads_per_group: int | None,
    groups_per_token: int | None,
) -> str | None:
    if candidate.needs_limits and (missing := without_limits(tensors[0], heads_per_group, groups_per_token)):
        return missing
    return candidate.unsupported(*tensors, attn_mask, dropout_p)
