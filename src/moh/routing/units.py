"""What a token chooses: single heads, the same number in every key/value group, or whole groups (`MoHConfig.routing_unit`).

Routers only give the scores, so the rule is the same for all: docs/method.md, section 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moh.config import MoHConfig


class Chosen:
    """How many units a token chooses of those that are routed, k / `MoHConfig.step`: the number that the dial changes.

    A graph of `torch.compile` holds for every setting: a plain number would be a constant of it, and each setting a graph
    of its own, of which torch keeps eight. The size of a tensor is an input of the graph. It is 2 larger than the number,
    since sizes of 0 and 1 are constants too. An exported program keeps the number that it was exported with.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        with torch.inference_mode(False):  # a graph is for tensors of inference mode or for others
            self._size = torch.empty(number + 2, 0, device="cpu")  # no memory; the device is not in the graph
        torch._dynamo.maybe_mark_dynamic(self._size, 0)

    def __call__(self) -> int:
        return self._size.shape[0] - 2 if is_for_all_settings() else self._number


def is_for_all_settings() -> bool:
    """Whether this is traced into a graph that holds for every setting of the dial."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def choose(scores: Tensor, config: MoHConfig, chosen: int | None = None) -> Tensor:
    """Which routed heads are active, by the scores of the routed heads `[..., h_r]`: bool `[..., h_r]`, k of them True.

    A group's score is the sum of its heads'. `chosen` is the number of units, a `Chosen()`; None for the configuration's.
    """
    if chosen is None:
        chosen = config.active_heads // config.step
    if not is_for_all_settings() and chosen * config.step == config.num_routed:
        return torch.ones_like(scores, dtype=torch.bool)
    if config.routing_unit == "head":
        return _largest(scores, chosen)
    if config.routing_unit == "group_balanced":
        in_groups = scores.unflatten(-1, (config.step, -1))  # [..., Hkv, h_r / Hkv]
        return _largest(in_groups, chosen).flatten(-2)
    groups = scores.unflatten(-1, (-1, config.step)).sum(-1)  # [..., routed groups]
    active = _largest(groups, chosen)[..., None]
    return active.expand(*active.shape[:-1], config.step).flatten(-2)


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
    none = torch.zeros_like(scores, dtype=torch.bool)
    if is_for_all_settings():  # no shape may depend on k; sorting all takes about as long
        falling = scores.argsort(dim=-1, descending=True, stable=True)
        return none.scatter(-1, falling, (torch.arange(scores.shape[-1], device=scores.device) < k).expand_as(scores))
    top = scores.topk(k, dim=-1).indices
    if torch._C._get_tracing_state() is not None:  # it can't scatter the value True
        return none.scatter(-1, top, torch.ones_like(top, dtype=torch.bool))
    return none.scatter(-1, top, True)


def _ranks(scores: Tensor) -> Tensor:
    """Place of each entry in its row sorted by falling scores."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
