"""Room in a `DynamicCache` for tokens to come, so that a new one is written in place.

transformers' own update joins the old and the new keys and values to new tensors: in decoding it copies the whole cache
for every token. Not for caches of other kinds, which keep their own update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

MIN_ROOM = 64
"""Tokens that a cache is enlarged by at least; beyond, by an eighth, so that copying it is rare."""


@dataclass(eq=False)
class CacheRoom:
    """Buffers of one layer's cache, of which the first `used` tokens are taken.

    A token's place is written once: whoever holds the cache's tensors from before, or a copy of the layer, sees no
    change. A layer that has been cropped, reordered or filled by others thus no longer fits, and gets a room of its own.

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
            and (not self.keys.is_inference() or torch.is_inference_mode_enabled())
        )

    def take(self, layer: DynamicLayer) -> None:
        """Count the token that has been written behind the last one to the layer's cache."""
        self.used += 1
        layer.keys = self.keys.narrow(2, 0, self.used)
        layer.values = self.values.narrow(2, 0, self.used)


def room_for_a_token(cache: Cache | None, layer_index: int) -> CacheRoom | None:
    """The room of a layer's cache, which is moved to a larger one where it is full; None for caches of other kinds.

    Not inside of autograd: the cache's tensors lose their graph.
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
