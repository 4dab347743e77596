"""Trade-off curves: quality and speed of a MoH model at each share of heads, and of a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh.evaluation.perplexity import perplexity
from moh.evaluation.speed import Rate, device_name, measure_speed
from moh.models.dial import active_heads, allowed_counts, moh_routers, set_active_heads
from moh.models.transformers.families import check_positions
from moh.routing import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moh.data.images.sources import ImageSource


@dataclass(frozen=True)
class Speed:
    """A rate per second: median and quartiles over the repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One share of heads.

    Attributes:
        share: share of all heads that a token uses; by a threshold, what the calibration's tokens used on average.
        active_heads: routed heads active per token, one number per layer.
        perplexity: on the text; None for an image classifier.
        stderr: standard error of the perplexity's logarithm.
        top1: percent of images classified correctly; None for a language model.
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
    """Points by rising share, and the conditions of the measurement.

    Attributes:
        points: one per share.
        measured: sizes of the measurement, machine and software, as printed.
        dense: the dense model's point (share 1, no `active_heads`); None without a dense model.
    """

    points: tuple[Point, ...]
    measured: dict[str, Any]
    dense: Point | None = None

    def rows(self) -> list[dict[str, object]]:
        """One flat row per point, measured columns only; the dense model's is last, with `active_heads` "dense"."""
        rows = []
        for point in (*self.points, *((self.dense,) if self.dense else ())):
            row: dict[str, object] = {}
            for name, value in asdict(point).items():
                if name == "active_heads":
                    row[name] = "dense" if point is self.dense else " ".join(map(str, value))
                elif isinstance(value, dict):
                    row |= {f"{name}_per_second{'' if k == 'median' else '_' + k}": v for k, v in value.items()}
                elif value is not None:
                    row["images_per_second" if name == "images" else name] = value
            rows.append(row)
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        dense = None if self.dense is None else asdict(self.dense)
        return {"points": [asdict(point) for point in self.points], "dense": dense, "measured": self.measured}


MAX_POINTS = 9
"""Most shares of a curve if none are given."""


def dial_shares(model: nn.Module, *, points: int = MAX_POINTS) -> list[float]:
    """Evenly spaced shares, from the fewest to the most heads that the model can use, no finer than one head per layer.

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
    dense: PreTrainedModel | None = None,
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
        dense: a dense model with the same vocabulary, dtype and device, to measure as well.
        shares: shares of all heads, each above 0 and at most 1; None means `dial_shares(model)`.
        batch_size: blocks per forward pass.
        prompt_tokens, decode_tokens, repeats: as in `measure_speed`; the shares take turns. With 0 repeats no speed is
            measured.

    Raises:
        ValueError: the model has no MoH layer, `dense` has one or does not match it, or `moh.set_active_heads`,
            `perplexity` or `measure_speed` raises it.
    """
    wanted = _wanted(model, shares)
    if dense is not None:
        _check_dense(model, dense)
        if dense.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"dense must have the model's vocabulary of {model.config.vocab_size} tokens, got one of "
                f"{dense.config.vocab_size}"
            )
    beside = {} if dense is None else {"dense": dense}
    prompt = blocks.flatten()[:prompt_tokens][None]
    if repeats:
        for each in (model, *beside.values()):
            check_positions(
                each.config, prompt.shape[1] + decode_tokens, name="prompt_tokens and decode_tokens together"
            )
    points = []
    for share in wanted:
        with active_heads(model, share) as got:
            layers = tuple(r.config.active_heads for r in moh_routers(model))
            quality = perplexity(model, blocks, batch_size=batch_size, progress=progress)
            points.append(Point(got, layers, quality.perplexity, quality.stderr))
    if dense is not None:
        quality = perplexity(dense, blocks, batch_size=batch_size, progress=progress)
        points.append(Point(1.0, (), quality.perplexity, quality.stderr))
    measured = _measured(model) | {"tokens": blocks.shape[0] * (blocks.shape[1] - 1), "seq_len": blocks.shape[1]}
    if repeats:
        names = {str(i): list(point.active_heads) for i, point in enumerate(points[: len(wanted)])}
        with active_heads(model, names["0"]):  # restores the dial at the end
            report = measure_speed(
                dict.fromkeys(names, model) | beside,
                prompt=prompt,
                decode_tokens=decode_tokens,
                repeats=repeats,
                before=lambda name: name in names and set_active_heads(model, names[name]),
                progress=progress,
            )
        points = [
            replace(p, prefill=_speed(s.prefill), decode=_speed(s.decode))
            for p, s in zip(points, report.models.values(), strict=True)
        ]
        measured |= {"prompt_tokens": prompt.shape[1], "decode_tokens": decode_tokens, "repeats": repeats}
    return _curve(points, len(wanted), measured)


def image_curve(
    model: nn.Module,
    images: ImageSource,
    *,
    dense: nn.Module | None = None,
    shares: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> Curve:
    """Top-1 accuracy and images per second of a classifier at each share of heads.

    Args:
        model: a MoH model of timm or transformers; left as it was.
        images: labelled images, as `evaluate_images` takes them.
        dense: a dense model with the same dtype and device, to measure as well.
        shares: shares of all heads, each above 0 and at most 1; None means `dial_shares(model)`.
        batch_size: images per forward pass.
        workers: processes that load images.

    Raises:
        ValueError: a model is not an image classifier, `model` has no MoH layer, `dense` has one or does not match it, or
            `moh.set_active_heads` or `evaluate_images` raises it.
    """
    from moh.evaluation.images import evaluate_images
    from moh.models.classifiers import is_classifier

    for name, each in (("model", model), ("dense", dense)):
        if each is not None and not is_classifier(each):
            raise ValueError(f"{name} must be an image classifier of timm or transformers, got a {type(each).__name__}")
    wanted = _wanted(model, shares)
    if dense is not None:
        _check_dense(model, dense)

    def measure(each: nn.Module, share: float, layers: tuple[int, ...]) -> Point:
        result = evaluate_images(each, images, batch_size=batch_size, workers=workers, progress=progress)
        counts.append(result.images)
        return Point(share, layers, top1=result.top1, images=result.images_per_second)

    points: list[Point] = []
    counts: list[int] = []
    for share in wanted:
        with active_heads(model, share) as got:
            points.append(measure(model, got, tuple(r.config.active_heads for r in moh_routers(model))))
    if dense is not None:
        points.append(measure(dense, 1.0, ()))
    return _curve(points, len(wanted), _measured(model) | {"images": counts[-1], "batch_size": batch_size})


def _wanted(model: nn.Module, shares: Sequence[float] | None) -> list[float]:
    wanted = sorted(set(dial_shares(model) if shares is None else map(float, shares)))
    if not wanted:
        raise ValueError("shares must name at least one share of heads, got none")
    for share in wanted:
        with active_heads(model, share):
            pass  # a share out of range fails now, not after minutes of measuring
    return wanted


def _check_dense(model: nn.Module, dense: nn.Module) -> None:
    if any(isinstance(module, Router) for module in dense.modules()):
        raise ValueError(f"dense must be a model of dense attention, got a {type(dense).__name__} with MoH layers")
    ours, theirs = next(model.parameters()), next(dense.parameters())
    if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        raise ValueError(
            f"dense must have the model's dtype and device, {ours.dtype} on {ours.device}, got {theirs.dtype} on "
            f"{theirs.device}"
        )


def _curve(points: Sequence[Point], count: int, measured: dict[str, Any]) -> Curve:
    """A curve from points whose first `count` are the MoH model's; one more is the dense model's."""
    return Curve(tuple(points[:count]), measured, dense=next(iter(points[count:]), None))


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
