"""The trade-off of one model over its range of budgets: quality and speed against the share of heads that tokens use.

The dial (`moh.set_active_heads`) is turned from budget to budget; the model is left as it was. Pictures: `curve_plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh.evaluation.machine import device_name
from moh.evaluation.perplexity import perplexity
from moh.evaluation.speed import Rate, measure_speed
from moh.models.budget import active_heads, allowed_counts, moh_routers, set_active_heads
from moh.models.families.table import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moh.training.images.sources import ImageSource

MAX_POINTS = 9
"""Shares of a curve for which none are named, at most."""


@dataclass(frozen=True)
class Speed:
    """A rate's median over the repeats and its quartiles, per second."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        share: of all heads that a token uses.
        active_heads: routed heads active per token, of each layer.
        perplexity: on the text; None for an image classifier.
        stderr: standard error of its logarithm.
        top1: percent of the images that are recognised; None for a language model.
        prefill, decode: tokens per second; None if not measured.
        images: images per second; None for a language model.
    """

    share: float
    active_heads: tuple[int, ...]
    perplexity: float | None = None
    stderr: float | None = None
    top1: float | None = None
    prefill: Speed | None = None
    decode: Speed | None = None
    images: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points by rising share, and what they were measured with.

    Attributes:
        points: one per budget.
        measured: sizes of the measurement, the machine and the software, as they are printed.
    """

    points: tuple[Point, ...]
    measured: dict[str, Any]

    def rows(self) -> list[dict[str, object]]:
        """One flat row per point, without what was not measured."""
        rows = []
        for point in self.points:
            row: dict[str, object] = {}
            for name, value in asdict(point).items():
                if name == "active_heads":
                    row[name] = " ".join(map(str, value))
                elif isinstance(value, dict):
                    row |= {f"{name}_per_second{'' if k == 'median' else '_' + k}": v for k, v in value.items()}
                elif value is not None:
                    row["images_per_second" if name == "images" else name] = value
            rows.append(row)
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"points": [asdict(point) for point in self.points], "measured": self.measured}


def budgets(model: nn.Module, *, points: int = MAX_POINTS) -> list[float]:
    """Shares from the fewest heads that the model can use to all that it can, evenly, by whole heads per layer.

    Raises:
        ValueError: the model has no MoH layer, or `points` is below 1.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    routers = moh_routers(model)
    layers = [(r.config, allowed_counts(r)) for r in routers]
    total = sum(c.num_heads for c, _ in layers)
    fewest, most = (sum(c.num_shared + choose(ks) for c, ks in layers) / total for choose in (min, max))
    steps = min(points - 1, max(len(ks) for _, ks in layers) - 1)
    return [fewest + (most - fewest) * i / steps for i in range(steps + 1)] if steps else [most]


def text_curve(
    model: PreTrainedModel,
    blocks: Tensor,
    *,
    shares: Sequence[float] | None = None,
    batch_size: int = 4,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    repeats: int = 5,
    progress: bool = True,
) -> Curve:
    """Perplexity, prefill and decoding speed of a language model at each share of heads.

    Args:
        model: a MoH language model; left as it was.
        blocks: `[n, seq_len]` token ids of held-out text.
        shares: of all heads, each above 0 and at most 1; None means `budgets(model)`.
        batch_size: blocks per forward pass.
        prompt_tokens, decode_tokens, repeats: as `measure_speed` takes them; the budgets take turns. No repeats
            measure no speed.

    Raises:
        ValueError: the model has no MoH layer, or what `moh.set_active_heads`, `perplexity` or `measure_speed` refuse.
    """
    wanted = _wanted(model, shares)
    prompt = blocks.flatten()[:prompt_tokens][None]
    if repeats:
        check_positions(model.config, prompt.shape[1] + decode_tokens, name="prompt_tokens and decode_tokens together")
    points = []
    for share in wanted:
        with active_heads(model, share) as got:
            layers = tuple(r.config.active_heads for r in moh_routers(model))
            quality = perplexity(model, blocks, batch_size=batch_size, progress=progress)
            points.append(Point(got, layers, quality.perplexity, quality.stderr))
    measured = _measured(model) | {"tokens": blocks.shape[0] * (blocks.shape[1] - 1), "seq_len": blocks.shape[1]}
    if repeats:
        names = {str(i): list(point.active_heads) for i, point in enumerate(points)}
        with active_heads(model, names["0"]):  # restores the dial at the end
            report = measure_speed(
                dict.fromkeys(names, model),
                prompt=prompt,
                decode_tokens=decode_tokens,
                repeats=repeats,
                before=lambda name: set_active_heads(model, names[name]),
                progress=progress,
            )
        points = [
            Point(p.share, p.active_heads, p.perplexity, p.stderr, None, _speed(s.prefill), _speed(s.decode))
            for p, s in zip(points, report.models.values(), strict=True)
        ]
        measured |= {"prompt_tokens": prompt.shape[1], "decode_tokens": decode_tokens, "repeats": repeats}
    return Curve(tuple(points), measured)


def image_curve(
    model: nn.Module,
    images: ImageSource,
    *,
    shares: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> Curve:
    """Top-1 accuracy and images per second of a classifier at each share of heads.

    Args:
        model: a MoH model of timm; left as it was.
        images: labelled images, as `evaluate_images` takes them.
        shares: of all heads, each above 0 and at most 1; None means `budgets(model)`.
        batch_size: images per forward pass.
        workers: processes that load images.

    Raises:
        ValueError: the model has no MoH layer, or what `moh.set_active_heads` or `evaluate_images` refuse.
    """
    from moh.evaluation.images import evaluate_images

    points, count = [], 0
    for share in _wanted(model, shares):
        with active_heads(model, share) as got:
            layers = tuple(r.config.active_heads for r in moh_routers(model))
            result = evaluate_images(model, images, batch_size=batch_size, workers=workers, progress=progress)
        points.append(Point(got, layers, top1=result.top1, images=result.images_per_second))
        count = result.images
    return Curve(tuple(points), _measured(model) | {"images": count, "batch_size": batch_size})


def _wanted(model: nn.Module, shares: Sequence[float] | None) -> list[float]:
    wanted = sorted(set(budgets(model) if shares is None else map(float, shares)))
    if not wanted:
        raise ValueError("shares must name at least one share of heads, got none")
    for share in wanted:
        with active_heads(model, share):
            pass  # refused now and not after minutes of measuring
    return wanted


def _speed(rate: Rate) -> Speed:
    return Speed(rate.median, rate.low, rate.high)


def _measured(model: nn.Module) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        "device": device_name(weight.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
