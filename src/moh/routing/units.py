"""What a token chooses: single heads, the same number in every key/value group, or whole groups (`MoHConfig.routing_unit`).

Routers only give the scores, so the rule is the same for all: docs/method.md, section 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moh.config import MoHConfig


def choose(scores: Tensor, config: MoHConfig) -> Tensor:
    """Which routed heads are active, by the scores of the routed heads `[..., h_r]`: bool `[..., h_r]`, k of them True.

    A group's score is the sum of its heads'.
    """
    k = config.active_heads
    if k == config.num_routed:
        return torch.ones_like(scores, dtype=torch.bool)
    if config.routing_unit == "head":
        return _largest(scores, k)
    if config.routing_unit == "group_balanced":
        in_groups = scores.unflatten(-1, (config.step, -1))  # [..., Hkv, h_r / Hkv]
        return _largest(in_groups, k // config.step).flatten(-2)
    groups = scores.unflatten(-1, (-1, config.step)).sum(-1)  # [..., routed groups]
    chosen = _largest(groups, k // config.step)[..., None]
    return chosen.expand(*chosen.shape[:-1], config.step).flatten(-2)


def order(scores: Tensor, config: MoHConfig) -> Tensor:
    """Head indices `[..., H]`, int64, by falling score: the first n are the heads that a layer of n heads keeps.

    Args:
        scores: of all heads, `[..., H]`; +inf for heads that are always kept.
        config: n must be a multiple of its `step`.
    """
    falling = scores.argsort(dim=-1, descending=True, stable=True)
    if config.routing_unit == "head":
        return falling
    in_groups = scores.unflatten(-1, (config.kv_heads, -1))  # [..., Hkv, H / Hkv]
    if config.routing_unit == "group_balanced":
        ranks = _ranks(in_groups)
    else:
        ranks = _ranks(in_groups.sum(-1))[..., None].expand_as(in_groups)
    # Stable, so heads of equal rank keep falling scores: each next `step` heads are one per group, or one whole group.
    by_rank = ranks.flatten(-2).gather(-1, falling).argsort(dim=-1, stable=True)
    return falling.gather(-1, by_rank)


def strongest(mean: Tensor, count: int, config: MoHConfig) -> tuple[int, ...]:
    """The `count` heads with the largest `mean` `[H]` that such a layer may share, ascending."""
    return tuple(sorted(order(mean, config)[:count].tolist()))


def _largest(scores: Tensor, k: int) -> Tensor:
    """Bool mask of the k largest of each row."""
    top = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, True)


def _ranks(scores: Tensor) -> Tensor:
    """Place of each entry in its row sorted by falling scores."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
