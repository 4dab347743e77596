"""One new token through an attention layer by one operator, `moh::cpu_decode_layer`, where nothing asks for its parts.

With a single token calling a dozen operators takes as long as their work. `MoHLlamaAttention.forward` is the definition
and serves all else: training, prefill, other devices and caches, adapters, hooks, quantised weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moh.attention import cpu
from moh.attention.plain import is_plain
from moh.attention.refusals import DTYPES, transforms_are_active
from moh.config import MoHConfig
from moh.models.transformers.cache_room import room_for_a_token
from moh.routing import LinearRouter

if TYPE_CHECKING:
    from moh.models.llama.modeling import MoHLlamaAttention

MAX_BATCH = 16
"""With more sequences the products are work enough for PyTorch's own, and calling them hardly counts."""


def decode(
    attention: MoHLlamaAttention,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache: Cache | None,
    backend: str | None,
) -> Tensor | None:
    """The layer's output `[B, 1, C]` for x `[B, 1, C]`, which joins the cache; None where the operator can't serve.

    The linear router's predictions are summed up in an order of their own: two that are equal but for rounding may be
    ranked otherwise than by `LinearRouter`.
    """
    B, N, _ = x.shape
    router = attention.router
    if (
        N != 1
        or B > MAX_BATCH
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or backend not in (None, "cpu")
        or router.uses_queries
        or x.device.type != "cpu"
        or x.dtype not in DTYPES
        or torch.is_autocast_enabled("cpu")
        or transforms_are_active()
        or attention.head_dim > cpu.MAX_WIDTH
        or attention.head_dim % 2
        or (attention.training and attention.attention_dropout)
        or not all(is_plain(p, x) for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
        or cpu.unavailable() is not None
    ):
        return None
    room = room_for_a_token(cache, attention.layer_idx)
    if room is None or room.keys.dtype != x.dtype or room.keys.device != x.device or room.keys.shape[0] != B:
        return None
    gates = weight = bias = None
    if type(router) is LinearRouter and not router.is_observed() and is_plain(router.contribution, x):
        weight, bias = router.contribution.weight, router.contribution.bias
    else:
        gates = router(x).gates
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    out: Tensor = torch.ops.moh.cpu_decode_layer(
        x,
        gates,
        weight,
        bias,
        router.config.shared_indices,
        router.config.active_heads,
        q.weight,
        q.bias,
        k.weight,
        k.bias,
        v.weight,
        v.bias,
        o.weight,
        o.bias,
        *position_embeddings,
        room.keys,
        room.values,
        room.used,
        attention_mask,
        attention.scaling,
        *_choice(router.config),
    )
    room.take(cache.layers[attention.layer_idx])  # type: ignore[union-attr]  # it has room, so it is a cache
    return out


def _choice(config: MoHConfig) -> tuple[int, int]:
    """In how many parts of the routed heads as many are chosen, and how many neighbours are chosen together."""
    if config.routing_unit == "group_balanced":
        return config.step, 1
    return 1, config.step
