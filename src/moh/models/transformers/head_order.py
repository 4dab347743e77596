"""Put the heads of a Llama model in an order in which equal slices of them have equal shares of shared and routed heads.

What the model computes stays the same. For tensor parallelism (`moh.models.transformers.tensor_parallel`), which gives every
process a slice of the heads. Not for choosing which heads are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.models.layer_heads import compact_heads
from moh.routing import LinearRouter, TwoStageRouter, build_router


@torch.no_grad()
def interleave_shared_heads(model: Any, ranks: int) -> list[list[int]]:
    """Reorder the heads of every layer, in place, so that each of `ranks` equal slices has its share of shared heads.

    Heads that share keys and values move together, so the shares are equal if the groups allow it: always with
    `routing_unit="group_balanced"` and, without grouped-query attention, if `ranks` divides the number of shared heads;
    otherwise as nearly equal as a greedy choice makes them.

    Args:
        model: a `MoHLlamaModel` or `MoHLlamaForCausalLM`; its weights and `config.shared_heads` change.
        ranks: number of slices; it must divide the numbers of heads and of key/value heads.

    Returns:
        for every layer the number of shared heads of each slice.

    Raises:
        ValueError: the heads can't be divided, or the model has output projections for several budgets.
    """
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    check_ranks(config, ranks)
    if config.output_budgets is not None:
        raise ValueError("model must not have config.output_budgets: their changes to W_O are not reordered")
    configs, counts = [], []
    for layer, before in zip(model.base_model.layers, config.layer_configs(), strict=True):
        order = _group_order(before, heads // groups, groups, ranks)
        head_order = [group * (heads // groups) + i for group in order for i in range(heads // groups)]
        after = _reordered(before, head_order)
        _move_heads(layer.self_attn, before, after, head_order, order)
        configs.append(after)
        shared = set(after.shared_indices)
        size = heads // ranks
        counts.append([len(shared.intersection(range(rank * size, (rank + 1) * size))) for rank in range(ranks)])
    config.shared_heads = compact_heads(configs)["shared_heads"]
    return counts


def check_ranks(config: Any, ranks: int) -> None:
    """Check that the heads of a model can be divided.

    Raises:
        ValueError: they can't.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if ranks < 1 or getattr(config, name) % ranks:
            raise ValueError(f"ranks must divide {name} = {getattr(config, name)}, got {ranks}")


def _group_order(config: MoHConfig, size: int, groups: int, ranks: int) -> list[int]:
    """The key/value groups in their new order: those with most shared heads first, each to the slice with the fewest."""
    shared = [sum(head // size == group for head in config.shared_indices) for group in range(groups)]
    slices: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(range(groups), key=lambda group: -shared[group]):
        open_slices = [members for members in slices if len(members) < groups // ranks]
        min(open_slices, key=lambda members: sum(shared[other] for other in members)).append(group)
    return [group for members in slices for group in sorted(members)]


def _reordered(config: MoHConfig, head_order: Sequence[int]) -> MoHConfig:
    shared = set(config.shared_indices)
    places = tuple(place for place, head in enumerate(head_order) if head in shared)
    return MoHConfig(
        config.num_heads,
        places,
        config.active_heads,
        config.router,
        config.scale_gates,
        routing_unit=config.routing_unit,
        kv_heads=config.kv_heads,
    )


def _move_heads(
    attention: Any, before: MoHConfig, after: MoHConfig, head_order: Sequence[int], group_order: Sequence[int]
) -> None:
    """Move the rows, columns and router's outputs of one layer; head i becomes the former `head_order[i]`."""
    for linear, order in (
        (attention.q_proj, head_order),
        (attention.k_proj, group_order),
        (attention.v_proj, group_order),
    ):
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                tensor.copy_(_moved(tensor, order))
    output = attention.o_proj.weight
    output.copy_(_moved(output.t(), head_order).t())

    old = attention.router
    router = build_router(after, attention.config.hidden_size, device=output.device, dtype=output.dtype)
    router.load_state_dict(old.state_dict())
    router.train(old.training)
    if isinstance(router, LinearRouter):
        moves: list[tuple[nn.Linear | None, Sequence[int], Sequence[int]]] = [
            (router.contribution, range(before.num_heads), head_order)
        ]
    elif isinstance(router, TwoStageRouter):
        moves = [
            (router.shared, before.shared_indices, [head_order[i] for i in after.shared_indices]),
            (router.routed, before.routed_indices, [head_order[i] for i in after.routed_indices]),
        ]
    else:
        moves = []
    for linear, former, heads in moves:
        if linear is not None:
            rows = [list(former).index(head) for head in heads]
            linear.weight.copy_(linear.weight[rows])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[rows])
    for parameter, replaced in zip(router.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(replaced.requires_grad)
    attention.router = router


def _moved(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`tensor` with the equal blocks of its first dimension in another order."""
    moved: Tensor = tensor.unflatten(0, (len(order), -1))[list(order)]
    return moved.flatten(0, 1)
