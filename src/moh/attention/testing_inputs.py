"""Random inputs of routed attention, of every kind that a backend has to handle. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moh.attention.call import Call, with_four_dims

ACTIVITIES = ("all", "none", "random", "half", "uneven", "idle_token", "idle_head", "one_pair")
MASKS = (
    "none",
    "padding",  # bool [B, 1, 1, Nk]
    "bool_2d",  # [Nq, Nk]
    "bool_full",  # [B, H, Nq, Nk]
    "blind_rows",  # bool [B, 1, Nq, Nk], some queries may see no key
    "bias_per_head",  # float [H, Nq, Nk]
    "bias_per_key",  # float [B, H, 1, Nk]
    "bias_per_query",  # float [B, 1, Nq, 1]: changes nothing but gradients, which are 0
    "bias_blind_rows",  # float [1, 1, Nq, Nk] with -inf, some rows throughout
)
SPECIAL_MASKS = (
    "lowest_rows",  # float [B, 1, Nq, Nk], some rows at the lowest finite number throughout
    "lowest_padding",  # float [B, 1, 1, Nk] of 0 and that number, which the first sequence has throughout
    "nan_pairs",  # float [1, H, Nq, Nk], NaN in the first head alone: for one pair, and for one that causality hides
    "nan_rows",  # float [B, 1, Nq, Nk], NaN throughout one row of the first sequence
    "nan_keys",  # float [B, 1, 1, Nk], NaN for a key of the first sequence
    "inf_pairs",  # the same with +inf
    "inf_rows",
    "inf_keys",
)
"""Masks of unusual numbers; `call.py` has the rule for them."""


@dataclass
class Inputs:
    """Arguments of one call of `moh_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        return dict(attn_mask=self.attn_mask, is_causal=self.is_causal, scale=self.scale)

    @property
    def call(self) -> Call:
        """What `moh_attention` makes of them."""
        mask = None if self.attn_mask is None else with_four_dims(self.attn_mask)
        return Call(self.q, self.k, self.v, self.gates, **dict(self.options, attn_mask=mask))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        found = {"q": self.q, "k": self.k, "v": self.v, "gates": self.gates}
        if self.attn_mask is not None and self.attn_mask.requires_grad:
            found["attn_mask"] = self.attn_mask
        return found


def make_inputs(
    *,
    B: int = 2,
    Hkv: int = 2,
    G: int = 2,
    Nq: int = 5,
    Nk: int | None = None,
    D: int = 8,
    Dv: int | None = None,
    activity: str = "random",
    mask: str = "none",
    is_causal: bool = False,
    scale: float | None = None,
    token_major: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs that require gradients, additive masks too, with `G` query heads per key/value head.

    `token_major` lays queries, keys and values out in memory as projections leave them, `[B, N, heads, D]`.
    """
    random = torch.Generator().manual_seed(seed)
    H, Nk, Dv = Hkv * G, Nq if Nk is None else Nk, D if Dv is None else Dv

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    def coin(p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < p

    q, k, v = normal(B, H, Nq, D), normal(B, Hkv, Nk, D), normal(B, Hkv, Nk, Dv)
    if token_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    gates = normal(B, Nq, H) * make_active(activity, coin, B, Nq, H)
    attn_mask = make_mask(mask, coin, normal, B, H, Nq, Nk)
    q, k, v, gates = (x.to(device).requires_grad_() for x in (q, k, v, gates))
    attn_mask = None if attn_mask is None else attn_mask.to(device)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask.requires_grad_()
    return Inputs(q, k, v, gates, attn_mask, is_causal, scale)


def make_active(activity: str, coin: Callable[..., Tensor], B: int, Nq: int, H: int) -> Tensor:
    """Which heads tokens use, bool `[B, Nq, H]`, in one of the ways in `ACTIVITIES`."""
    active = torch.ones(B, Nq, H, dtype=torch.bool)
    if activity == "none":
        active[:] = False
    elif activity == "random":
        active = coin(0.6, B, Nq, H)
    elif activity == "half":
        active[..., ::2] = False
    elif activity == "uneven":  # some heads always, some never
        shares = torch.linspace(-0.3, 1.3, H).clamp(0, 1)
        active = torch.stack([coin(float(share), B, Nq) for share in shares], dim=-1)
    elif activity == "idle_token":
        active[:, Nq // 2 :][:, :1] = False
    elif activity == "idle_head":
        active[..., H // 2] = False
    elif activity == "one_pair":
        active[:] = False
        active[-1:, -1:, -1] = True
    elif activity != "all":
        raise ValueError(f"activity must be one of {', '.join(map(repr, ACTIVITIES))}, got {activity!r}")
    return active


def make_mask(
    mask: str, coin: Callable[..., Tensor], normal: Callable[..., Tensor], B: int, H: int, Nq: int, Nk: int
) -> Tensor | None:
    """A mask of one of the kinds in `MASKS` and `SPECIAL_MASKS`, broadcastable to `[B, H, Nq, Nk]`."""
    if mask == "none":
        return None
    if mask == "padding":
        return coin(0.7, B, 1, 1, Nk)
    if mask == "bool_2d":
        return coin(0.7, Nq, Nk)
    if mask == "bool_full":
        return coin(0.7, B, H, Nq, Nk)
    if mask == "blind_rows":
        return coin(0.8, B, 1, Nq, Nk) & coin(0.6, B, 1, Nq, 1)
    if mask == "bias_per_head":
        return normal(H, Nq, Nk)
    if mask == "bias_per_key":
        return normal(B, H, 1, Nk)
    if mask == "bias_per_query":
        return normal(B, 1, Nq, 1)
    if mask in SPECIAL_MASKS:
        return _make_special_mask(mask, coin, normal, B, H, Nq, Nk)
    if mask != "bias_blind_rows":
        raise ValueError(f"mask must be one of {', '.join(map(repr, MASKS + SPECIAL_MASKS))}, got {mask!r}")
    seen = coin(0.8, 1, 1, Nq, Nk) & coin(0.6, 1, 1, Nq, 1)
    return normal(1, 1, Nq, Nk).masked_fill(~seen, -torch.inf)


def _make_special_mask(
    mask: str, coin: Callable[..., Tensor], normal: Callable[..., Tensor], B: int, H: int, Nq: int, Nk: int
) -> Tensor:
    what, where = mask.split("_")
    if where == "padding":
        found = normal(B, 1, 1, Nk).zero_()
        seen = coin(0.7, B, 1, 1, Nk)
        seen[:1] = False
        return found.masked_fill(~seen, torch.finfo(found.dtype).min)
    if what == "lowest":
        found = normal(B, 1, Nq, Nk)
        return found.masked_fill(coin(0.4, B, 1, Nq, 1), torch.finfo(found.dtype).min)
    number = torch.nan if what == "nan" else torch.inf
    found = (
        normal(B, 1, 1, Nk) if where == "keys" else normal(1, H, Nq, Nk) if where == "pairs" else normal(B, 1, Nq, Nk)
    )
    if where == "rows":
        found[:1, :, Nq // 2] = number
    elif where == "keys":
        found[:1, ..., Nk // 2] = number
    else:
        found[:, 0, Nq - 1, :1] = found[:, 0, 0, Nk - 1] = number
    return found
