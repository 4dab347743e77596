"""One new token through an attention layer by one operator, `moh::cpu_decode_layer`, if nothing needs its parts.

With a single token, calling a dozen operators takes as long as their work. `RoutedAttention.forward` is the definition and
handles everything else: training, prefill, other devices and caches, adapters, hooks, quantised weights that `matrix_of`
does not know. The operator writes the token's keys and values in place, in room that a `DynamicCache` gets here:
transformers' own update concatenates old and new, which copies the whole cache for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moh.attention import cpu
from moh.attention.call import DTYPES, transforms_are_active
from moh.attention.projections import is_plain, matrix_of
from moh.attention.routed import parts_and_neighbours
from moh.models.transformers.remembered import remembered
from moh.routing.router import is_untouched
from moh.routing.routers import is_as_named

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
    layer_index = attention.core.layer_idx
    fixed = remembered(attention, x, _fixed, nn.Module.modules)
    if fixed is None:
        return None
    room = room_for_a_token(cache, layer_index)
    if room is None or room.keys.dtype != x.dtype or room.keys.device != x.device or room.keys.shape[0] != x.shape[0]:
        return None
    gates, (weight, bias), threshold = None, fixed.scores, fixed.threshold
    if weight is None or router.is_recorded():
        gates, weight, bias, threshold = attention.gates(x), None, None, None
    out: Tensor = torch.ops.moh.cpu_decode_layer.default(
        x,
        gates,
        weight,
        bias,
        *fixed.before_angles,
        *position_embeddings,
        room.keys,
        room.values,
        room.used,
        attention_mask,
        *fixed.after_mask,
        threshold,
        *fixed.scales,
    )
    room.take(cache.layers[layer_index])  # type: ignore[union-attr]  # it has room, so it is a cache
    return out


class _Fixed(NamedTuple):
    """What every token's call of the operator gets of a layer, by the places of its arguments.

    Attributes:
        scores: weight and bias of the map of x that decides; None where the router has to be called.
        before_angles: shared heads, routed heads per token, and weight and bias of the four projections.
        after_mask: scale, and how heads are chosen together.
        threshold: of the scores.
        scales: of integer weights.
    """

    scores: tuple[Tensor | None, Tensor | None]
    before_angles: tuple[Any, ...]
    after_mask: tuple[float, int, int]
    threshold: float | None
    scales: tuple[Tensor | None, ...]


def _fixed(attention: RoutedAttention, x: Tensor) -> _Fixed | None:
    """None for a layer that the operator can't compute."""
    core, router = attention.core, attention.router
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
    scores = router.linear_scores()
    decides = scores is not None and is_as_named(router) and is_untouched(router) and is_plain(scores, x)
    return _Fixed(
        (scores.weight, scores.bias) if decides and scores is not None else (None, None),
        (
            router.config.shared_indices,
            router.config.active_heads,
            *(tensor for matrix in matrices for tensor in matrix[:2]),
        ),
        (core.scaling, *parts_and_neighbours(router.config)),
        router.threshold() if decides else None,
        tuple(matrix.scale for matrix in matrices),
    )


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
