"""Put the heads of a Llama model in an order in which equal slices of them have equal shares of shared and routed heads.

What the model computes stays the same. For tensor parallelism (`moh.models.llama.tensor_parallel`), which gives every
process a slice of the heads. Not for choosing which heads are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moh.config import MoHConfig
from moh.models.heads import compact_heads


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
        ValueError: the heads can't be divided, or the model has a W_O for each number of heads.
    """
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    check_ranks(config, ranks)
    if config.output_changes is not None:
        raise ValueError("model must not have config.output_changes: their changes to W_O are not reordered")
    configs, counts = [], []
    for layer, before in zip(model.base_model.layers, config.layer_configs(), strict=True):
        order = _group_order(before, heads // groups, groups, ranks)
        head_order = [group * (heads // groups) + i for group in order for i in range(heads // groups)]
        _move_heads(layer.self_attn, head_order, order)
        configs.append(layer.self_attn.router.config)
        shared = set(configs[-1].shared_indices)
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


def _move_heads(attention: Any, head_order: Sequence[int], group_order: Sequence[int]) -> None:
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
    attention.router.reorder(head_order)


def _moved(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`tensor` with the equal blocks of its first dimension in another order."""
    moved: Tensor = tensor.unflatten(0, (len(order), -1))[list(order)]
    return moved.flatten(0, 1)
