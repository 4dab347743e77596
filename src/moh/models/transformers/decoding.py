"""One new token through an attention layer by one operator, `moh::cpu_decode_layer`, if nothing needs its parts.

With a single token, calling a dozen operators takes as long as their work. `RoutedAttention.forward` is the definition and
handles everything else: training, prefill, other devices and caches, adapters, hooks, quantised weights that `matrix_of`
does not know. The operator writes the token's keys and values in place, in room that a `DynamicCache` gets here:
transformers' own update concatenates old and new, which copies the whole cache for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moh.attention import cpu
from moh.attention.call import DTYPES, transforms_are_active
from moh.attention.projections import is_plain, matrix_of
from moh.attention.routed import parts_and_neighbours

if TYPE_CHECKING:
    from moh.models.transformers.attention import RoutedAttention

MAX_BATCH = 16
"""For larger batches the products dominate and call overhead no longer matters."""

MIN_ROOM = 64
"""A full cache grows by an eighth, and by at least this many tokens, so that it is rarely copied."""


def decode(
    attention: RoutedAttention,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    cache: Cache | None,
    backend: str | None,
) -> Tensor | None:
    """The layer's output `[B, 1, C]` for x `[B, 1, C]`, which joins the cache; None where the operator can't be used.

    A sliding window is either in the mask, or in a cache of another kind, for which the operator can't be used. The
    linear router's predictions are summed in another order than by `LinearRouter`: two that are equal but for rounding may
    be ranked differently.

    Args:
        attention: of a family whose attention `is_plain`.
        x: the layer's input.
        position_embeddings: cosines and sines `[B or 1, 1, D]`.
        attention_mask: as transformers gives it; None where the token sees everything before it.
        cache: of the model.
        backend: the attention backend; None for the fastest.
    """
    router = attention.router
    if position_embeddings is None or router.reads_queries or not is_decoded(x, backend):
        return None
    core = attention.core
    if core.head_dim > cpu.MAX_WIDTH or core.head_dim % 2 or (attention.training and attention.dropout_rate):
        return None
    matrices = []
    for projection in (
        attention.query_projection,
        attention.key_projection,
        attention.value_projection,
        attention.output_projection,
    ):
        matrix = matrix_of(projection, x)
        if matrix is None:
            return None
        matrices.append(matrix)
    room = room_for_a_token(cache, core.layer_idx)
    if room is None or room.keys.dtype != x.dtype or room.keys.device != x.device or room.keys.shape[0] != x.shape[0]:
        return None
    gates = weight = bias = None
    scores = router.linear_scores()
    if scores is not None and not router.is_observed() and is_plain(scores, x):
        weight, bias = scores.weight, scores.bias
    else:
        gates = attention.gates(x)
    out: Tensor = torch.ops.moh.cpu_decode_layer(
        x,
        gates,
        weight,
        bias,
        router.config.shared_indices,
        router.config.active_heads,
        *(tensor for matrix in matrices for tensor in matrix[:2]),
        *position_embeddings,
        room.keys,
        room.values,
        room.used,
        attention_mask,
        core.scaling,
        *parts_and_neighbours(router.config),
        router.threshold() if gates is None else None,
        *(matrix.scale for matrix in matrices),
    )
    room.take(cache.layers[core.layer_idx])  # type: ignore[union-attr]  # it has room, so it is a cache
    return out


def is_decoded(x: Tensor, backend: str | None) -> bool:
    """Whether x `[B, N, C]` is one new token of a few sequences for which the operators without gradients can be used."""
    return (
        x.dim() == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= MAX_BATCH
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and backend in (None, "cpu")
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not transforms_are_active()
        and cpu.unavailable() is None
    )


@dataclass(eq=False)
class CacheRoom:
    """Buffers of one layer's cache; the first `used` tokens are taken.

    A token's place is written only once, so earlier tensors of the cache and copies of the layer stay as they are. A layer
    that was cropped, reordered or filled elsewhere no longer fits, and gets a new room.

    Attributes:
        keys, values: `[B, Hkv, capacity, D]`.
        used: tokens written so far.
    """

    keys: Tensor
    values: Tensor
    used: int

    def fits(self, layer: DynamicLayer) -> bool:
        """Whether the layer's cache is what this room holds, and one more token can be written."""
        capacity = self.keys.shape[2]
        return (
            self.used == layer.keys.shape[2]
            and self.used < capacity
            and layer.keys.data_ptr() == self.keys.data_ptr()
            and layer.values.data_ptr() == self.values.data_ptr()
            and layer.keys.shape[:2] == self.keys.shape[:2]
            and (not self.keys.is_inference() or torch.is_inference_mode_enabled())  # else not writable
        )

    def take(self, layer: DynamicLayer) -> None:
        """Add the token that was written behind the last one to the layer's cache."""
        self.used += 1
        layer.keys = self.keys.narrow(2, 0, self.used)
        layer.values = self.values.narrow(2, 0, self.used)


def room_for_a_token(cache: Cache | None, layer_index: int) -> CacheRoom | None:
    """The room of a layer's cache, moved to a larger one if it is full; None for caches of other kinds.

    Not under autograd: the cache's tensors lose their graph.
    """
    if cache is None or type(cache) is not DynamicCache or cache.offloading or len(cache.layers) <= layer_index:
        return None
    layer = cache.layers[layer_index]
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys.dim() != 4:
        return None
    room: CacheRoom | None = vars(layer).get("_moh_room")
    if room is None or not room.fits(layer):
        room = layer._moh_room = _enlarged(layer)
    return room


def _enlarged(layer: DynamicLayer) -> CacheRoom:
    used = layer.keys.shape[2]
    capacity = used + max(MIN_ROOM, used // 8)
    room = CacheRoom(_with_capacity(layer.keys, capacity), _with_capacity(layer.values, capacity), used)
    layer.keys, layer.values = room.keys.narrow(2, 0, used), room.values.narrow(2, 0, used)
    return room


def _with_capacity(x: Tensor, capacity: int) -> Tensor:
    larger = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    larger[:, :, : x.shape[2]] = x
    return larger
