"""Subjects `images` and `diffusion`: the package's named models against their dense controls and dense-then-mask.

Random weights. One case is one size of model at one batch size, with a contender for each share that there is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import moh  # noqa: F401  (registers our models with timm)
from benchmarks.cases import Case, Contender
from benchmarks.dense import weigh_heads
from moh._extras import require

Make = Callable[..., nn.Module]


@dataclass(frozen=True)
class Family:
    """A size of model: its dense control, and its MoH models by their share of heads."""

    dense: str
    shares: dict[float, str]
    case: Case


def _vit(size: str, heads: int) -> Family:
    name = f"vit_{size}_patch16_224"
    shares = {share: f"moh_{name}_{share:.0%}".rstrip("%") for share in (0.5, 0.75, 0.9)}
    case = Case("images", "forward", heads=heads, kv_heads=heads, length=197, layers=12, router="two_stage", model=name)
    return Family(name, shares, case)


def _transnext(size: str, heads: int, shares: tuple[float, ...], layers: int) -> Family:
    name = f"moh_transnext_{size}"
    case = Case("images", "forward", heads=heads, kv_heads=heads, length=3136, width=24, layers=layers, router="two_stage",
                model=name)  # fmt: skip
    return Family(f"{name}_dense", {share: f"{name}_{share:.0%}".rstrip("%") for share in shares}, case)


def _dit(size: str, heads: int, width: int, layers: int) -> Family:
    name = f"dit_{size}_2"
    case = Case("diffusion", "forward", 2, heads=heads, kv_heads=heads, length=256, width=width, layers=layers,
                router="two_stage", model=name)  # fmt: skip
    return Family(name, {0.75: f"moh_{name}_75", 0.9: f"moh_{name}_90"}, case)


IMAGES = [
    _vit("tiny", 3),
    _vit("small", 6),
    _vit("base", 12),
    _transnext("small", 24, (0.75, 0.8), 37),
    _transnext("base", 32, (0.5, 0.75), 38),
]
DIFFUSION = [_dit("s", 6, 64, 12), _dit("b", 12, 64, 12), _dit("l", 24, 64, 24), _dit("xl", 24, 72, 28)]
FAMILIES = {str(family.case.model): family for family in (*IMAGES, *DIFFUSION)}


def image_cases(grid: str) -> list[Case]:
    """Batch 1 of every size, and batch 32 of those that take seconds; all sizes in the full grid."""
    if grid == "quick":
        return [_at_shares(IMAGES[0])]
    large = IMAGES if grid == "full" else IMAGES[:2]
    return [_at_shares(f) for f in IMAGES] + [replace(_at_shares(f), batch=32) for f in large]


def diffusion_cases(grid: str) -> list[Case]:
    """256 and 1,024 tokens, two images (guidance) and 16, only sizes that take seconds unless `grid` is "full"."""
    if grid == "quick":
        return [_at_shares(DIFFUSION[0])]
    full = grid == "full"
    some = [_at_shares(f) for f in (DIFFUSION if full else DIFFUSION[:2])]
    small = [_at_shares(f) for f in (DIFFUSION if full else DIFFUSION[:1])]
    long = [replace(case, length=1024) for case in small]
    found = some + long + [replace(case, batch=16) for case in small]
    return found + [replace(case, batch=16) for case in long] if full else found


def _at_shares(family: Family) -> Case:
    return replace(family.case, shares=tuple(family.shares))


def contenders(case: Case) -> list[Contender]:
    """Dense, and for each share ours and dense-then-mask with the same routing."""
    family = FAMILIES[str(case.model)]
    make, make_masked = _makers(case, family)
    inputs = _inputs(case)
    dense = make(family.dense)
    found = [Contender("dense", _step(dense, inputs))]
    for share, name in family.shares.items():
        ours = make(name)
        found.append(Contender("ours", _step(ours, inputs), share, share))
        masked = make_masked(name)
        for attention, moh_attention in zip(_attentions(masked), _attentions(ours), strict=True):
            if moh_attention.router is not None:
                weigh_heads(attention, attention.proj, moh_attention.router)  # type: ignore[arg-type]
        found.append(Contender("masked", _step(masked, inputs), share, share))
    return found


def _makers(case: Case, family: Family) -> tuple[Make, Make]:
    """A model by name, and the dense model with the MoH model's number of heads in each layer (published ones differ)."""
    if case.subject == "images":
        timm = require("timm", extra="vision")
        return timm.create_model, lambda _: timm.create_model(family.dense)
    create_dit = importlib.import_module("moh.models.diffusers").create_dit
    side = 2 * int(case.length**0.5)  # patches of 2
    make = partial(create_dit, sample_size=side)
    return make, partial(make, shared_heads=None, active_heads=None)


def _inputs(case: Case) -> tuple[Tensor, ...]:
    if case.subject == "images":
        return (torch.randn(case.batch, 3, 224, 224),)
    side = 2 * int(case.length**0.5)
    return (
        torch.randn(case.batch, 4, side, side),
        torch.randint(1000, (case.batch,)),
        torch.randint(1000, (case.batch,)),
    )


def _step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    model.eval()
    return lambda: model(*inputs)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """Attention modules in order: the modules with a number of heads and an output projection."""
    return [m for m in model.modules() if hasattr(m, "num_heads") and isinstance(getattr(m, "proj", None), nn.Linear)]
