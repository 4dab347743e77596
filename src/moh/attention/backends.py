"""`moh_attention`: one function over several backends, and the table that chooses between them.

The paper's weighted sum of heads, before the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moh.attention import cpu, flex, grouped, reference, sdpa
from moh.attention.call import Call, autocasts, check, with_four_dims
from moh.attention.gpu import backend as gpu


def _no_reason(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute routed attention.

    Attributes:
        name: what `moh_attention(backend=...)` takes.
        description: one line for `moh info`.
        attend: the weighted heads `[B, Nq, H, Dv]` of a call.
        why_not: why it can't handle a call, or None if it can.
        chosen_on: device types on which `backend=None` may choose it, None for all; elsewhere it is used only by name.
        why_not_chosen: why `backend=None` leaves out a call that it can handle, or None if it does not.
    """

    name: str
    description: str
    attend: Callable[[Call], Tensor]
    why_not: Callable[[Call], str | None]
    chosen_on: tuple[str, ...] | None = None
    why_not_chosen: Callable[[Call], str | None] = _no_reason


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ kernels, compiled on first use; CPU", cpu.attend, cpu.why_not),
        Backend(
            "grouped",
            "PyTorch's own attention, of equally many heads in every key/value group or by name of all; any device",
            grouped.attend,
            grouped.why_not,
            why_not_chosen=grouped.why_not_chosen,
        ),
        Backend(
            "triton",
            "Triton kernels that gather active queries; NVIDIA GPUs",
            gpu.attend,
            gpu.why_not,
            chosen_on=("cuda",),
        ),
        Backend(
            "flex",
            "PyTorch's FlexAttention on the blocks that have work; GPUs, forward pass on the CPU",
            flex.attend,
            flex.why_not,
            chosen_on=("cuda",),
        ),
        Backend("sdpa", "gathers active pairs around PyTorch's own attention; any device", sdpa.attend, sdpa.why_not),
        Backend("reference", "the definition: every head, then weighted", reference.attend, _no_reason),
    )
}
"""All backends by name, in order of preference: `backend=None` takes the first that supports the call."""


def _attend_to_train_every_gate(call: Call) -> Tensor:
    """All heads by the fastest backend, then weighted: a plain product, whose gradient reaches gates that are 0."""
    all_heads = call._replace(gates=torch.ones_like(call.gates), heads_per_group=None)
    heads = choose_backend(all_heads).attend(all_heads)
    gates = call.gates[..., None]
    # An inactive head that is not finite must not reach the output, which a product with 0 would let it
    return torch.where((gates != 0) | heads.isfinite(), heads, 0.0) * gates


STRAIGHT_THROUGH = Backend(
    "straight_through",
    "all heads, and the gradients of gates that are 0, as in the paper's continue-tuning; only by name",
    _attend_to_train_every_gate,
    _no_reason,
    chosen_on=(),
)
"""Not in `BACKENDS`: it saves nothing, and its gradients are not those of `moh_attention`'s definition.

By the paper's equations 9 and 10 the gradient of a gate that is 0 is that of its head as if it were active, so inactive heads
learn whether they should have been chosen. That takes the output of every head.
"""

BY_NAME = (*BACKENDS, STRAIGHT_THROUGH.name)
"""Names that `moh_attention(backend=...)` takes."""


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
    heads_per_group: int | None = None,
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
        attn_mask: broadcastable to `[B, H, Nq, Nk]`; bool (True = may be seen) or added to the scores. Only False and -inf
            hide a key; `moh.attention.call` has the rule for rows of the lowest number, NaN and +inf.
        scale: factor of the scores; None means `1 / sqrt(D)`.
        dropout_p: probability of dropping an attention weight. As in PyTorch's function it is applied whenever it is
            above 0, so pass 0 in evaluation.
        heads_per_group: a promise that no token uses more than this many heads of one key/value head, from 1 to
            H / Hkv (`MoHConfig.heads_per_group`); other heads may be left out. None promises nothing: backend "grouped"
            then computes all heads.
        backend: name of a backend, or None for the first in `BACKENDS` that supports the call.

    Returns:
        `[B, Nq, H, Dv]` in q's dtype (autocast's, inside `torch.autocast`), weighted by the gates, 0 where inactive,
        token-major so that the output projection reads it without a transpose. Differentiable in q, k, v, gates and
        an additive mask; the gradient of a gate that is 0 is defined as 0, since its head was never computed (except with
        backend "straight_through", `STRAIGHT_THROUGH`).
        A query that may see no key gives 0.

    Raises:
        ValueError: a shape, dtype, probability or backend name is not as above, or the named backend can't handle
            the call; the message states which and why.
    """
    if autocasts(q) and q.dtype != torch.float64:  # as with PyTorch's own function
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, gates = q.to(dtype), k.to(dtype), v.to(dtype), gates.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    call = Call(q, k, v, gates, attn_mask, is_causal, scale, dropout_p, heads_per_group)
    check(call)
    if attn_mask is not None:
        call = call._replace(attn_mask=with_four_dims(attn_mask))
    return choose_backend(call, backend).attend(call)


def choose_backend(call: Call, backend: str | None = None) -> Backend:
    """The backend that `moh_attention` would use for these arguments.

    Raises:
        ValueError: `backend` is unknown or can't handle the call.
    """
    if backend is None:
        return next(b for b in BACKENDS.values() if _waits(b, call) is None and b.why_not(call) is None)
    if backend == STRAIGHT_THROUGH.name:
        return STRAIGHT_THROUGH
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BY_NAME))}, got {backend!r}")
    if (reason := BACKENDS[backend].why_not(call)) is not None:
        raise ValueError(f"backend {backend!r} can't handle this call: {reason}")
    return BACKENDS[backend]


def backends_passed_over(call: Call) -> dict[str, str | None]:
    """Why `backend=None` would pass over each backend for this call; None where it would not: the first of these is used.

    The tensors may be empty views: only shapes, dtype, device and whether gradients are required count.
    """
    return {name: b.why_not(call) or _waits(b, call) for name, b in BACKENDS.items()}


def _waits(backend: Backend, call: Call) -> str | None:
    """Why a backend that could handle a call is used only by name, or None."""
    device = call.q.device.type
    if backend.chosen_on is None or device in backend.chosen_on:
        return backend.why_not_chosen(call)
    return f"on {device} it is used only by name"
