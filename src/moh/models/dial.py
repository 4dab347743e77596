"""The dial: how many heads each token uses, changed at run time on a trained or converted model of any family.

Only the number of routed heads changes, never which heads are shared. W_O for each number: `output_changes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moh.config import FIXED, MoHConfig
from moh.models.heads import HasLayerHeads, compact_heads
from moh.models.output_changes import add_output_changes, switches, used_heads
from moh.routing import Router
from moh.routing.attached import count_layers


def set_active_heads(model: nn.Module, k: int | float | Sequence[int]) -> float:
    """Set how many heads each token uses from now on; `save_pretrained` keeps it.

    Args:
        model: any model with MoH attention layers, or what wraps one (DDP, a LoRA, `torch.compile`).
        k: routed heads active per token, on average with the threshold router: an int for every layer that routes; a list
            with one entry per layer; or a float in (0, 1], the share of *all* heads, shared ones included, on average over
            the layers. A share is distributed by `config.head_costs` if the conversion has saved what each layer needs,
            else evenly.

    Returns:
        the share of heads that a token now uses, over all layers; for a float k the nearest that whole heads allow.

    Raises:
        ValueError: the model has no MoH layer or is only a part of a transformers model, or k is out of range; nothing
            was changed.

    Examples:
        >>> moh.set_active_heads(model, 3)  # doctest: +SKIP
        0.7777777777777778
        >>> moh.set_active_heads(model, 0.75)  # doctest: +SKIP
        0.7518518518518519
    """
    routers = moh_routers(model)
    _configurations(model)  # raises if the model is only a part
    layers = [r.config for r in routers]
    counts = _counts(model, routers, k)
    return _apply(
        model,
        routers,
        [layer if layer.active_heads == n else dataclasses.replace(layer, active_heads=n)
         for layer, n in zip(layers, counts, strict=True)],
    )  # fmt: skip


@contextmanager
def active_heads(model: nn.Module, k: int | float | Sequence[int]) -> Iterator[float]:
    """`set_active_heads(model, k)` for the block; afterwards each token uses as many heads as before.

    Yields:
        the share of heads that a token uses inside.

    Raises:
        ValueError: as `set_active_heads`.
    """
    routers = moh_routers(model)
    before = [r.config for r in routers]
    share = set_active_heads(model, k)
    try:
        yield share
    finally:
        _apply(model, routers, before)


class HasActiveHeads:
    """The dial as a method of a model."""

    def set_active_heads(self, k: int | float | Sequence[int]) -> float:
        """Set how many heads each token uses: `moh.set_active_heads(self, k)`."""
        assert isinstance(self, nn.Module)
        return set_active_heads(self, k)

    def post_init(self) -> None:
        """Called by transformers when the model has been built: adds its changes of W_O."""
        add_output_changes(self)  # type: ignore[arg-type]
        super().post_init()  # type: ignore[misc]


def moh_routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers.

    Raises:
        ValueError: the model has no router.
    """
    routers = _routers(model)
    if not routers:
        raise ValueError(
            f"model has no layer whose heads are routed: a {type(model).__name__} of dense attention uses all of them; "
            "moh.convert makes a MoH model of it"
        )
    return routers


def _routers(module: nn.Module) -> list[Router]:
    return [part for part in module.modules() if isinstance(part, Router)]


def head_share(layers: Sequence[MoHConfig]) -> float:
    """Share of the heads that a token uses, over all heads of all layers."""
    return sum(c.num_shared + c.active_heads for c in layers) / sum(c.num_heads for c in layers)


def allowed_counts(router: Router) -> list[int]:
    """Every k, ascending, that a layer's router can be set to."""
    return [k for k in router.active_range() if _refusal(router.config, k) is None]


def _refusal(config: MoHConfig, k: int) -> str | None:
    try:
        dataclasses.replace(config, active_heads=k)
    except ValueError as error:
        return str(error)
    return None


def _counts(model: nn.Module, routers: Sequence[Router], k: Any) -> list[int]:
    """k of each layer, checked."""
    allowed = [allowed_counts(r) for r in routers]
    if all(r.config.router == FIXED for r in routers):
        raise ValueError(
            "active_heads can't be set: the heads of every layer are fixed (router='fixed'), and the others do not exist; "
            "convert the dense model with a router that chooses heads, such as router='linear'"
        )
    if isinstance(k, float):
        return _of_share(model, routers, allowed, k)
    if isinstance(k, int) and not isinstance(k, bool):
        counts = [k if r.config.num_routed else 0 for r in routers]
    elif isinstance(k, Sequence) and not isinstance(k, str) and all(type(n) is int for n in k):
        counts = list(k)
        if len(counts) != len(routers):
            raise ValueError(
                f"active_heads must have one entry per MoH layer ({len(routers)}), got {len(counts)} entries"
            )
    else:
        raise ValueError(
            "active_heads must be an int, a list of ints with one per layer, or a float share of the heads in (0, 1], "
            f"got {k!r}"
        )
    for index, (router, options, n) in enumerate(zip(routers, allowed, counts, strict=True)):
        if n not in options:
            reason = _refusal(router.config, n) or (
                f"active_heads must be {'0' if options == [0] else f'from {options[0]} to {options[-1]}'} with this "
                f"layer's learned router, whose weights {'score no' if options == [0] else 'belong to'} routed heads, "
                f"got {n}"
            )
            raise ValueError(f"layer {index}: {reason}")
    return counts


def _of_share(model: nn.Module, routers: Sequence[Router], allowed: Sequence[Sequence[int]], share: float) -> list[int]:
    if not 0 < share <= 1:
        raise ValueError(f"active_heads as a share of the heads must be above 0 and at most 1, got {share}")
    layers = [r.config for r in routers]
    num_heads = [c.num_heads for c in layers]
    total = share * sum(num_heads)
    options = [[c.num_shared + k for k in ks] for c, ks in zip(layers, allowed, strict=True)]
    fewest, most = sum(map(min, options)), sum(map(max, options))
    # Half a head too few or too many still rounds to a number that can be set
    if not fewest - 0.5 <= total <= most + 0.5:
        raise ValueError(
            f"active_heads as a share of the heads must be between {fewest / sum(num_heads):.3f} and "
            f"{most / sum(num_heads):.3f} for this model, {'whose shared heads are always active, ' * (total < fewest)}"
            f"got {share}"
        )
    saved = next((c.head_costs for c, own in _configurations(model) if own == list(routers)), None)
    costs = []
    if saved is not None:
        if [len(c) for c in saved] != [h + 1 for h in num_heads]:
            raise ValueError("config.head_costs must have one list per layer, with a cost for 0 to num_heads heads")
        costs = [{n: layer[n] for n in ns} for layer, ns in zip(saved, options, strict=True)]
    else:
        even = _evenly(num_heads, share)
        costs = [{n: float((n - aim) ** 2) for n in ns} for aim, ns in zip(even, options, strict=True)]
    heads = spend(costs, total)
    return [n - c.num_shared for n, c in zip(heads, layers, strict=True)]


def spend(costs: Sequence[Mapping[int, float]], total: float) -> list[int]:
    """Heads per layer with the least summed cost; together as near to `total` as possible.

    Args:
        costs: for each layer, number of heads that it may use -> cost.
        total: heads over all layers; if no choice adds up to it, the nearest sum is taken (the lower one of two).

    Returns:
        heads of each layer, keys of `costs`.
    """
    spent = torch.zeros(1, dtype=torch.float64)  # entry s: least cost of s heads in the layers so far
    choices: list[Tensor] = []
    for layer in costs:
        least = torch.full((len(spent) + max(layer),), torch.inf, dtype=torch.float64)
        choice = torch.zeros(len(least), dtype=torch.int64)
        for heads, cost in sorted(layer.items()):
            reached = spent + cost
            window = slice(heads, heads + len(spent))
            better = reached < least[window]
            least[window] = torch.where(better, reached, least[window])
            choice[window] = torch.where(better, heads, choice[window])
        spent = least
        choices.append(choice)
    # Back from the best sum, through each layer's choice
    sums = spent.isfinite().nonzero().flatten().tolist()
    left = min(sums, key=lambda s: (abs(s - total), s))
    heads_of_layer = []
    for choice in reversed(choices):
        heads_of_layer.append(int(choice[left]))
        left -= heads_of_layer[-1]
    return heads_of_layer[::-1]


def _evenly(num_heads: Sequence[int], share: float) -> list[int]:
    """About `share` of each layer's heads, rounded so that the sum over the first layers is always the nearest."""
    even, before, seen = [], 0, 0
    for heads in num_heads:
        seen += heads
        upto = math.floor(share * seen + 0.5)
        even.append(upto - before)
        before = upto
    return even


def _apply(model: nn.Module, routers: Sequence[Router], layers: Sequence[MoHConfig]) -> float:
    for changes, weight, before, after in list(switches(model, routers, [layer.active_heads for layer in layers])):
        changes.switch(weight, before, after)
    for router, layer in zip(routers, layers, strict=True):
        router.config = layer
    count_layers(routers)
    for config, own in _configurations(model):
        configs = [router.config for router in own]
        for name, value in compact_heads(configs).items():
            setattr(config, name, value)
        if config.output_changes is not None:
            config.output_changes = {**config.output_changes, "used_heads": used_heads(configs)}
    for module in model.modules():
        register: Any = getattr(module, "register_to_config", None)  # a model of diffusers has it
        if isinstance(module, HasActiveHeads) and register is not None and (own := _routers(module)):  # none if dense
            register(**compact_heads([router.config for router in own]))
    return head_share(layers)


def _configurations(model: nn.Module) -> list[tuple[HasLayerHeads, list[Router]]]:
    """The configurations of transformers in a model, each once, with the routers of the layers that it describes.

    Raises:
        ValueError: a configuration describes another number of layers.
    """
    found: dict[int, tuple[Any, list[Router]]] = {}
    others: dict[int, str] = {}
    for module in model.modules():  # a model comes before its parts
        config = getattr(module, "config", None)
        if not isinstance(config, HasLayerHeads) or id(config) in found:
            continue
        own = _routers(module)
        if len(own) == config.num_attention_layers:
            found[id(config)] = config, own
        else:
            others.setdefault(id(config), f"{config.num_attention_layers} layers, got {len(own)} routers")
    wrong = [what for key, what in others.items() if key not in found]
    if wrong:
        raise ValueError(
            f"model must be whole, with one router for each layer that its configuration describes: {wrong[0]} (merge an "
            "adapter that keeps copies of routers, as modules_to_save does, first)"
        )
    return list(found.values())
