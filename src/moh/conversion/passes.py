"""Passes over the dense model: what calibration data shows about each layer, summed up in constant memory.

Heads against heads (which are redundant), inputs against contributions of heads (to fit a router), gated heads
against all heads (to refit W_O), and gradients of the loss (what each layer loses with fewer heads).
Only sums are kept; the closed forms on them are in `moh.conversion.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from moh._modes import evaluating
from moh.conversion.dense import DenseModel, check_finite
from moh.conversion.recording import Batches, checkpointed, give_back_memory, run, tapped
from moh.routing import Router

SUMS_BYTES = 1 << 27
"""Memory for the sums of one pass over the calibration data; if all layers' need more, there are more passes, which read
the file of a recording in parts."""


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
class HeadSums:
    """Sums over calibration tokens of one layer: z all heads, concatenated, `[HD]`, and x its input with a 1 appended, `[C + 1]`.

    `zz` = sum z z', `xx` = sum x x' and `xz` = sum x z', float64; the last two are empty where inputs are not asked for.
    """

    zz: Tensor  # [HD, HD]
    xx: Tensor  # [C + 1, C + 1]
    xz: Tensor  # [C + 1, HD]


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


def _roots(o_proj: Tensor, num_heads: int) -> Tensor:
    """R_i `[H, D, D]`, float32, with `||h R_i|| = ||h W_O^i||`: the length of a contribution from a product of width D, not C."""
    parts = o_proj.double().unflatten(-1, (num_heads, -1)).permute(1, 2, 0)  # [H, D, C]
    values, vectors = torch.linalg.eigh(parts @ parts.transpose(1, 2))
    roots: Tensor = vectors * values.clamp_min(0).sqrt()[:, None]
    return roots.float()


def collect_heads(
    dense: DenseModel, layers: Iterable[int], batches: Batches, *, inputs: bool = False
) -> dict[int, HeadSums]:
    """Run the dense model over `batches` and sum up the heads of some layers; with `inputs` also their inputs."""
    sums: dict[int, HeadSums] = {}
    for index in layers:
        attention = dense.attentions[index]
        width = attention.output_weight.shape[1]
        x, z = (attention.width + 1 if inputs else 0), width
        sums[index] = HeadSums(*(torch.zeros(*sizes, dtype=torch.float64) for sizes in ((z, z), (x, x), (x, z))))

    def add(index: int, x: Tensor, z: Tensor) -> None:
        if index not in sums:
            return
        z, layer = z.float(), sums[index]
        layer.zz += (z.T @ z).cpu().double()
        if inputs:
            x = nn.functional.pad(x.float(), (0, 1), value=1.0)  # [T, C + 1]
            layer.xx += (x.T @ x).cpu().double()
            layer.xz += (x.T @ z).cpu().double()

    run(dense, batches, add, sums.keys())
    return sums


def collect_contributions(
    dense: DenseModel, batches: Batches, unique: Sequence[Tensor] | None = None
) -> list[ContributionSums]:
    """Run the dense model over `batches` and sum up each layer's inputs and contributions.

    Args:
        unique: maps `[HD, HD]`, float32, one per layer, from all heads to that part of each whose contribution counts
            (`moh.conversion.fit.unique_part`); None counts the whole.
    """
    num_heads = dense.num_heads
    roots = [_roots(attention.written, num_heads) for attention in dense.attentions]
    sums: list[ContributionSums] = []
    for attention in dense.attentions:
        zeros = torch.zeros(attention.width + 1, attention.width + 1, dtype=torch.float64)
        sums.append(ContributionSums(zeros, zeros[:, :num_heads].clone(), zeros[:num_heads, :num_heads].clone()))

    def add(index: int, x: Tensor, z: Tensor) -> None:
        x = nn.functional.pad(x.float(), (0, 1), value=1.0)  # [T, C + 1]
        # One layer's map at a time on the model's device: all maps may be as large as the model
        root = roots[index].to(z.device)  # [H, D, D]
        if unique is None:
            parts = torch.einsum("thd,hde->the", z.float().unflatten(-1, (num_heads, -1)), root)
        else:  # both maps in one product with z
            of_heads = unique[index].to(z.device).unflatten(-1, (num_heads, -1))  # [HD, H, D]
            parts = (z.float() @ torch.einsum("ihd,hde->ihe", of_heads, root).flatten(1)).unflatten(-1, (num_heads, -1))
        c = parts.norm(dim=-1)  # [T, H]
        layer = sums[index]
        layer.xx += (x.T @ x).cpu().double()
        layer.xc += (x.T @ c).cpu().double()
        layer.cc += (c.T @ c).cpu().double()
        layer.tokens += x.shape[0]

    run(dense, batches, add)
    return sums


@torch.no_grad()  # a router's weights would otherwise keep a graph over all batches
def collect_several_outputs(
    dense: DenseModel, routers: Mapping[int, Sequence[Router]], batches: Batches
) -> dict[int, list[OutputSums]]:
    """Run the dense model and sum up the heads that routers keep against all heads, of some layers and several routers each.

    Args:
        routers: index of a layer -> its routers.

    Returns:
        index of a layer -> the sums of each of its routers.
    """
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

    run(dense, batches, add, sums.keys())
    return sums


def layer_groups(dense: DenseModel, *, matrices: int) -> Iterator[range]:
    """Layers whose sums, `matrices` times `[HD, HD]` in float64 each, fit `SUMS_BYTES` together."""
    width = max(attention.output_weight.shape[1] for attention in dense.attentions)
    at_a_time = max(1, SUMS_BYTES // (8 * width**2 * max(1, matrices)))
    layers = len(dense.attentions)
    for start in range(0, layers, at_a_time):
        yield range(start, min(start + at_a_time, layers))


class RanksHeads(Protocol):
    """What states which heads a layer of n heads uses: a router that ranks heads, or a fixed order."""

    def order(self, x: Tensor) -> Tensor:
        """Head indices of every token of x `[..., C]`: `[..., H]`, the first n of them used by a layer of n heads.

        By a threshold a token uses its own number of the first ones, n on average.
        """
        ...


def layer_costs(dense: DenseModel, routers: Sequence[RanksHeads], batches: Iterator[Tensor]) -> Tensor:
    """Estimated rise of the loss, in nats per token, if one layer used only n heads.

    For a skipped set S of heads it is about E[(sum_S s_i)^2] / 2 per token, with s_i = <dL/dz_i, z_i>: the empirical
    Fisher information along what is left out. This takes one backward pass.

    Args:
        dense: the dense model; its gradients are left as they were.
        routers: one per layer; their `order` gives the n heads that a token would use. With a threshold, by which tokens
            use n on average, this counts n for each of them.
        batches: samples `[B, ...]` that the model reads.

    Returns:
        `[L, H + 1]` float64; entry n is the cost of n heads, 0 for n = H.
    """
    return costs_of_choices(dense, [routers], batches)[0]


def costs_of_choices(dense: DenseModel, choices: Sequence[Sequence[RanksHeads]], batches: Iterator[Tensor]) -> Tensor:
    """`layer_costs` of several choices of heads, `[choices, L, H + 1]`, by the same pass."""
    num_heads = dense.num_heads
    costs = torch.zeros(len(choices), len(dense.attentions), num_heads + 1, dtype=torch.float64)
    tokens = 0

    def watch(index: int, x: Tensor) -> Callable[[Tensor], None]:
        nonlocal tokens
        orders = [of_layers[index].order(x.float()).flatten(0, -2) for of_layers in choices]  # [T, H]
        tokens += len(orders[0]) if index == 0 else 0

        def add(effect: Tensor) -> None:
            for choice, order in enumerate(orders):
                ordered = effect.flatten(0, -2).gather(-1, order)
                # entry n: sum over all after the first n heads
                skipped = ordered.flip(-1).cumsum(-1).flip(-1).cpu().double()
                costs[choice, index, :-1] += skipped.square().sum(0) / 2

        return add

    _effects(dense, batches, dense.loss, watch)
    return costs / max(tokens, 1)


def losses_at(
    dense: DenseModel, choices: Sequence[Sequence[Router]], batches: Iterator[Tensor], places: Tensor
) -> Tensor:
    """Estimated rise of the loss behind some places, in nats per place, by each head that a router leaves out there.

    To first order it is -s_i at the places where head i is left out, with s_i as in `layer_costs`. One backward pass.

    Args:
        dense: a language model that generates.
        choices: per choice of heads one router per layer, all of which decide by the layer's input.
        batches: token ids `[B, N]`.
        places: `[P]`, positions in them, whose next tokens' loss counts.

    Returns:
        `[choices, L, H]` float64; negative where a head is better left out.
    """
    losses = torch.zeros(len(choices), len(dense.attentions), dense.num_heads, dtype=torch.float64)
    count = 0

    def watch(index: int, x: Tensor) -> Callable[[Tensor], None]:
        nonlocal count
        count += len(x) * len(places) if index == 0 else 0
        left_out = [of_layers[index](x[:, places].float()).gates == 0 for of_layers in choices]  # [B, P, H]

        def add(effect: Tensor) -> None:
            for choice, out in enumerate(left_out):
                losses[choice, index] -= (effect[:, places] * out).sum((0, 1)).cpu().double()

        return add

    places = places.to(dense.device)
    _effects(dense, batches, partial(dense.loss_behind, places=places), watch)
    return losses / max(count, 1)


def _effects(
    dense: DenseModel,
    batches: Iterator[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    watch: Callable[[int, Tensor], Callable[[Tensor], None]],
) -> None:
    """Run the dense model forwards and backwards: `watch(layer, x)` is called with each layer's input `[B, N, C]`, and what it
    returns with s `[B, N, H]`, s_i = <dL/dz_i, z_i>."""
    model = dense.model
    heads: dict[int, Tensor] = {}  # of a block that is run again: those of the first run would be held for all layers

    def see(index: int, x: Tensor, z: Tensor) -> None:
        # z itself would hold its hook, and so every sample's graph, until Python collects circles
        detached = z.detach()
        if runs_again() or not dense.blocks:
            heads[index] = detached
        if runs_again():
            return
        give_back_memory()  # of the layers before, whose tensors of a long block the allocator would keep in pieces
        with torch.no_grad():
            add = watch(index, x)

        def see_gradient(gradient: Tensor) -> None:
            give_back_memory()
            check_finite(gradient, f"layer {index} has gradients of")
            add((gradient * heads.pop(index)).float().unflatten(-1, (dense.num_heads, -1)).sum(-1))

        z.register_hook(see_gradient)

    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # only the heads' gradients are needed
    try:
        # The caller may have gradients off
        with (
            torch.enable_grad(),
            evaluating(model),
            checkpointed(dense.blocks) as runs_again,
            tapped(dense.attentions, see),
        ):
            for batch in batches:
                loss = loss_of(batch)
                check_finite(loss.detach(), f"the loss, behind layer {len(dense.attentions) - 1}, is")
                loss.backward()
                give_back_memory()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
