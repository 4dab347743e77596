"""Passes over the dense model: what calibration data shows about each layer, summed up in constant memory.

Heads against heads (which are redundant), inputs against contributions of heads (to fit a router), gated heads
against all heads (to refit W_O), and gradients of the loss (what each layer loses with fewer heads).
Only sums are kept; the closed forms on them are in `moh.conversion.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moh.conversion.dense import DenseAttention, DenseModel, check_finite
from moh.routing import Router

SUMS_BYTES = 4 << 30
"""Memory for the sums of one pass over the calibration data; if all layers' need more, there are more passes."""


@dataclass
class ContributionSums:
    """Sums over calibration tokens of one layer, float64.

    With x the layer's input with a 1 appended, `[C + 1]`, and c its heads' contributions, `[H]`
    (`head_contributions`): `xx` = sum x x', `xc` = sum x c', `cc` = sum c c', over `tokens` tokens.
    """

    xx: Tensor  # [C + 1, C + 1]
    xc: Tensor  # [C + 1, H]
    cc: Tensor  # [H, H]
    tokens: int = 0


@dataclass
class OutputSums:
    """Sums over calibration tokens of one layer: z all heads, concatenated, and g those that the router keeps, `[HD]`.

    `gg` = sum g g' and `gz` = sum g z', float64.
    """

    gg: Tensor  # [HD, HD]
    gz: Tensor  # [HD, HD]


def head_contributions(z: Tensor, o_proj: Tensor, num_heads: int) -> Tensor:
    """`||H_i W_O^i||_2` of every token and head.

    Args:
        z: all heads of each token, concatenated, `[T, H*D]`.
        o_proj: weight of the output projection, `[C, H*D]`, as it reaches the residual stream.

    Returns:
        `[T, H]`, float32.
    """
    heads = z.float().unflatten(-1, (num_heads, -1)).transpose(0, 1)  # [H, T, D]
    parts = o_proj.float().unflatten(-1, (num_heads, -1)).permute(1, 2, 0)  # [H, D, C]
    return torch.stack([(h @ w).norm(dim=-1) for h, w in zip(heads, parts, strict=True)], dim=-1)


def collect_heads(dense: DenseModel, layers: Iterable[int], batches: Iterator[Tensor]) -> dict[int, Tensor]:
    """Run the dense model over `batches` and sum up z z' of some layers, z all heads, concatenated: `[HD, HD]`, float64."""
    sums: dict[int, Tensor] = {}
    for index in layers:
        width = dense.attentions[index].output_weight.shape[1]
        sums[index] = torch.zeros(width, width, dtype=torch.float64)

    def add(index: int, x: Tensor, z: Tensor) -> None:
        if index in sums:
            z = z.float()
            sums[index] += (z.T @ z).cpu().double()

    _run(dense, batches, add)
    return sums


def collect_contributions(
    dense: DenseModel, batches: Iterator[Tensor], unique: Sequence[Tensor] | None = None
) -> list[ContributionSums]:
    """Run the dense model over `batches` and sum up each layer's inputs and contributions.

    Args:
        unique: maps `[HD, HD]`, float32, one per layer, from all heads to that part of each whose contribution counts
            (`moh.conversion.fit.unique_part`); None counts the whole.
    """
    num_heads = dense.num_heads
    sums: list[ContributionSums] = []
    for attention in dense.attentions:
        zeros = torch.zeros(attention.width + 1, attention.width + 1, dtype=torch.float64)
        sums.append(ContributionSums(zeros, zeros[:, :num_heads].clone(), zeros[:num_heads, :num_heads].clone()))
    written = [attention.written for attention in dense.attentions]

    def add(index: int, x: Tensor, z: Tensor) -> None:
        x = nn.functional.pad(x.float(), (0, 1), value=1.0)  # [T, C + 1]
        # One layer's map at a time on the model's device: all maps may be as large as the model
        z = z if unique is None else z.float() @ unique[index].to(z.device)
        c = head_contributions(z, written[index], num_heads)
        layer = sums[index]
        layer.xx += (x.T @ x).cpu().double()
        layer.xc += (x.T @ c).cpu().double()
        layer.cc += (c.T @ c).cpu().double()
        layer.tokens += x.shape[0]

    _run(dense, batches, add)
    return sums


def collect_outputs(dense: DenseModel, routers: Sequence[Router], batches: Iterator[Tensor]) -> list[OutputSums]:
    """Run the dense model again and sum up, per layer, the heads that `routers` keep against all heads."""
    sums = collect_several_outputs(dense, {index: [router] for index, router in enumerate(routers)}, batches)
    return [sums[index][0] for index in range(len(routers))]


def collect_several_outputs(
    dense: DenseModel, routers: Mapping[int, Sequence[Router]], batches: Iterator[Tensor]
) -> dict[int, list[OutputSums]]:
    """As `collect_outputs`, for some layers (by index) and several routers each, in one run."""
    sums: dict[int, list[OutputSums]] = {}
    for index, of_layer in routers.items():
        width = dense.attentions[index].output_weight.shape[1]
        zeros = torch.zeros(width, width, dtype=torch.float64)
        sums[index] = [OutputSums(zeros.clone(), zeros.clone()) for _ in of_layer]

    def add(index: int, x: Tensor, z: Tensor) -> None:
        z = z.float()  # [T, H*D]
        for router, layer in zip(routers.get(index, ()), sums.get(index, ()), strict=True):
            gates = router(x[None].float()).gates[0].float()  # [T, H]
            g = (z.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]).flatten(1)
            layer.gg += (g.T @ g).cpu().double()
            layer.gz += (g.T @ z).cpu().double()

    _run(dense, batches, add)
    return sums


def layer_groups(dense: DenseModel, *, matrices: int) -> Iterator[range]:
    """Layers whose sums, `matrices` times `[HD, HD]` in float64 each, fit `SUMS_BYTES` together."""
    width = max(attention.output_weight.shape[1] for attention in dense.attentions)
    at_a_time = max(1, SUMS_BYTES // (8 * width**2 * max(1, matrices)))
    layers = len(dense.attentions)
    for start in range(0, layers, at_a_time):
        yield range(start, min(start + at_a_time, layers))


def layer_costs(dense: DenseModel, routers: Sequence[Router], batches: Iterator[Tensor]) -> Tensor:
    """Estimated rise of the loss, in nats per token, if one layer used only n heads.

    For a skipped set S of heads it is about E[(sum_S s_i)^2] / 2 per token, with s_i = <dL/dz_i, z_i>: the empirical
    Fisher information along what is left out. This takes one backward pass.

    Args:
        dense: the dense model; its gradients are left as they were.
        routers: one per layer; their `order` gives the n heads that a token would use.
        batches: samples `[B, ...]` that the model reads.

    Returns:
        `[L, H + 1]` float64; entry n is the cost of n heads, 0 for n = H.
    """
    model, num_heads = dense.model, dense.num_heads
    costs = torch.zeros(len(routers), num_heads + 1, dtype=torch.float64)
    tokens = 0

    def see(index: int, x: Tensor, z: Tensor) -> None:
        nonlocal tokens
        with torch.no_grad():
            order = routers[index].order(x.float()).flatten(0, -2)  # [T, H]
        tokens += len(order) if index == 0 else 0

        def see_gradient(gradient: Tensor) -> None:
            check_finite(gradient, f"layer {index} has gradients of")
            effect = (gradient * z.detach()).float().unflatten(-1, (num_heads, -1)).sum(-1)  # s: [B, N, H]
            ordered = effect.flatten(0, -2).gather(-1, order)
            skipped = (
                ordered.flip(-1).cumsum(-1).flip(-1).cpu().double()
            )  # entry n: sum over all after the first n heads
            costs[index, :-1] += skipped.square().sum(0) / 2

        z.register_hook(see_gradient)

    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # only the heads' gradients are needed
    try:
        # The caller may have gradients off
        with torch.enable_grad(), _evaluating(model), _tapped(dense.attentions, see):
            for batch in batches:
                loss = dense.loss(batch)
                check_finite(loss.detach(), f"the loss, behind layer {len(dense.attentions) - 1}, is")
                loss.backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return costs / max(tokens, 1)


def _run(dense: DenseModel, batches: Iterator[Tensor], add: Callable[[int, Tensor, Tensor], None]) -> None:
    """Forward passes in evaluation mode; `add(layer, x [T, C], z [T, H*D])` after each layer's attention."""

    def see(index: int, x: Tensor, z: Tensor) -> None:
        add(index, x.flatten(0, -2), z.flatten(0, -2))

    with torch.no_grad(), _evaluating(dense.model), _tapped(dense.attentions, see):
        for batch in batches:
            output = dense.run(batch)
            if output is not None:
                check_finite(output, f"layer {len(dense.attentions) - 1} gives")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _tapped(attentions: Sequence[DenseAttention], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, x, z)` in each layer: its input `[B, N, C]` and its heads, concatenated, `[B, N, H*D]`.

    Raises:
        ValueError: one of them is not finite, when the model runs.
    """
    inputs: dict[int, Tensor] = {}
    handles = []
    for index, attention in enumerate(attentions):

        def see_input(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            check_finite(args[0], f"layer {index - 1} gives layer {index}" if index else "layer 0 is given")
            inputs[index] = args[0]

        def see_heads(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            check_finite(args[0], f"the attention of layer {index} gives")
            see(index, inputs.pop(index), args[0])

        handles.append(attention.entry.register_forward_pre_hook(see_input))
        handles.append(attention.output.register_forward_pre_hook(see_heads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
