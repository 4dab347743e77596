"""Spend a budget of heads where it matters: estimate what each layer loses with fewer heads, then share the total out.

The estimate needs one backward pass over a few thousand tokens. For a skipped set S of heads the loss rises by about
E[(sum_S s_i)^2] / 2 per token, with s_i = <dL/dz_i, z_i>: the empirical Fisher information along what is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moh.conversion.dense import DenseModel
from moh.routing import Router


def layer_costs(dense: DenseModel, routers: Sequence[Router], batches: Iterator[Tensor]) -> Tensor:
    """Estimated rise of the loss, in nats per token, if one layer used only n heads.

    Args:
        dense: the dense model; its gradients are left as they were.
        routers: one per layer; they tell which n heads a token would use.
        batches: samples `[B, ...]` that the model reads.

    Returns:
        `[L, H + 1]` float64; entry n is the cost of n heads, 0 for n = H.
    """
    model, num_heads = dense.model, dense.num_heads
    costs = torch.zeros(len(routers), num_heads + 1, dtype=torch.float64)
    tokens = 0
    orders: list[Tensor] = [torch.empty(0)] * len(routers)

    def watch(index: int) -> list[Any]:
        def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                orders[index] = routers[index].order(args[0].float()).flatten(0, -2)  # [T, H]

        def see_heads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0]

            def see_gradient(gradient: Tensor) -> None:
                effect = (gradient * z.detach()).float().unflatten(-1, (num_heads, -1)).sum(-1)  # s: [B, N, H]
                ordered = effect.flatten(0, -2).gather(-1, orders[index])
                skipped = (
                    ordered.flip(-1).cumsum(-1).flip(-1).cpu().double()
                )  # entry n: sum over the heads after the first n
                costs[index, :-1] += skipped.square().sum(0) / 2

            z.register_hook(see_gradient)

        attention = dense.attentions[index]
        return [
            attention.entry.register_forward_pre_hook(see_input),
            attention.output.register_forward_pre_hook(see_heads),
        ]

    handles = [handle for index in range(len(routers)) for handle in watch(index)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()
    model.requires_grad_(False)  # only the heads' gradients are wanted
    try:
        with torch.enable_grad():  # the caller may have gradients off
            for batch in batches:
                dense.loss(batch).backward()
                tokens += len(orders[0])
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)
    return costs / max(tokens, 1)


def allocate(costs: Tensor, total: int, *, at_least: int = 1, step: int = 1) -> list[int]:
    """Heads per layer that minimise the summed cost with exactly `total` heads, by dynamic programming.

    Args:
        costs: `[L, H + 1]`, cost of n heads in each layer.
        total: heads over all layers.
        at_least: fewest heads of a layer, a multiple of `step`.
        step: every layer's heads are a multiple of it (`MoHConfig.step`), as H is.

    Raises:
        ValueError: `total` is out of reach.
    """
    layers, most = costs.shape[0], costs.shape[1] - 1
    if not bool(costs.isfinite().all()):
        raise ValueError(
            "costs must be finite: the calibration gave NaN or infinity (try the model in float32, or allocation='even')"
        )
    if not layers * at_least <= total <= layers * most:
        raise ValueError(f"total must be between {layers * at_least} and {layers * most} heads, got {total}")
    if total % step:
        raise ValueError(f"total must be a multiple of {step} heads, which tokens choose together, got {total}")
    best = {0: 0.0}  # heads spent so far -> least cost
    choices: list[dict[int, int]] = []
    for layer in costs.tolist():
        reached: dict[int, float] = {}
        choice: dict[int, int] = {}
        for spent, cost in best.items():
            for heads in range(at_least, most + 1, step):
                if spent + heads <= total and cost + layer[heads] < reached.get(spent + heads, float("inf")):
                    reached[spent + heads] = cost + layer[heads]
                    choice[spent + heads] = heads
        best = reached
        choices.append(choice)
    heads_of_layer: list[int] = []
    for choice in reversed(choices):
        heads_of_layer.append(choice[total])
        total -= choice[total]
    return heads_of_layer[::-1]
