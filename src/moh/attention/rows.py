"""The packing of active rows: they move to the front, in token order.

A row is a (token, query head of the group) pair of one key/value head; row r is head `r % G` and token `r // G`, with G
query heads per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which rows of each (sequence, key/value head) are active, and where they go; all int64, M = Nq * G.

    Attributes:
        rows: `[B, Hkv, M]`, a permutation of the rows: the active ones in token order, then the others.
        places: `[B, Hkv, M]`, its inverse: where each row went.
        counts: `[B, Hkv]`, how many rows are active.
        before: `[B, Hkv, Nq + 1]`, how many active rows belong to tokens before t.
    """

    rows: Tensor
    places: Tensor
    counts: Tensor
    before: Tensor


def pack(gates: Tensor, Hkv: int) -> Packing:
    """The packing of `gates` `[B, Nq, H]`, Nq > 0, in static shapes and without reading a number from the device.

    A prefix sum and a scatter, which a CUDA graph can record.
    """
    B, Nq, H = gates.shape
    G = H // Hkv
    active = rows_of(gates.transpose(1, 2) != 0, Hkv)  # [B, Hkv, M]
    upto = active.cumsum(-1)  # [B, Hkv, M], itself included
    counts = upto[..., -1]
    index = torch.arange(Nq * G, device=gates.device)
    # Inactive rows follow the active ones: `index - upto` inactive rows come before row `index`.
    places = torch.where(active, upto - 1, counts[..., None] + index - upto)
    rows = torch.empty_like(places).scatter_(-1, places, index.expand_as(places))
    before = torch.nn.functional.pad(upto[..., G - 1 :: G], (1, 0))  # [B, Hkv, Nq + 1], by each token's last row
    return Packing(rows, places, counts, before)


def rows_of(x: Tensor, Hkv: int) -> Tensor:
    """`[B, H, Nq, ...]` -> `[B, Hkv, Nq*G, ...]`: the rows of each key/value head, token-major."""
    B, H, Nq = x.shape[:3]
    G = H // Hkv
    return x.reshape(B, Hkv, G, *x.shape[2:]).transpose(2, 3).reshape(B, Hkv, Nq * G, *x.shape[3:])


def packed_rows_of(x: Tensor, rows: Tensor, live: Tensor) -> Tensor:
    """`[B, H, Nq, D]` -> `[B, Hkv, m, D]`: the first m packed rows, 0 where not `live`, both `[B, Hkv, m]`.

    Inactive rows count as 0: a NaN in one would reach the keys' gradient.
    """
    front = rows_of(x, rows.shape[1]).gather(2, rows[..., None].expand(-1, -1, -1, x.shape[-1]))
    return torch.where(live[..., None], front, 0.0)


def token_major(x: Tensor, Nq: int) -> Tensor:
    """`[B, Hkv, Nq*G, D]` -> `[B, Nq, H, D]`: rows back to tokens and heads."""
    B, Hkv, M, D = x.shape
    return x.view(B, Hkv, Nq, M // Nq, D).transpose(1, 2).reshape(B, Nq, Hkv * (M // Nq), D)
