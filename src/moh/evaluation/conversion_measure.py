"""Measure what converting one language model gives: every method at several shares, against the dense model.

All models are made from one calibration (`moh.conversion.fitted`) and measured on text that it has not seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh.conversion.fitted import DROPPED_LINEAR, FIXED_HEADS, ROUTED, Fitted, Made
from moh.conversion.plan import Plan
from moh.evaluation.conversion_report import TOLERATED, Cell, ConversionReport, Ratio, Rise, Times
from moh.evaluation.perplexity import PerplexityResult, perplexity, perplexity_rise
from moh.evaluation.speed import device_name, measure_speed
from moh.models.transformers.families import most_positions
from moh.routing import record_routing

SHARES = (0.9, 0.75, 0.6, 0.5)
"""Shares of the heads at which every method is measured, besides that of the model itself."""

METHODS = (ROUTED, FIXED_HEADS, DROPPED_LINEAR)
"""Methods that are compared, besides that of the model itself."""

LENGTHS = (512, 2_048, 8_192)
"""Tokens of the prompts that are timed by default."""

DECODE_TOKENS = 16
"""New tokens that are timed after each prompt."""


def report_lengths(config: Any, lengths: Sequence[int] | None = None) -> list[int]:
    """Lengths of the timed prompts, ascending: as given, or `LENGTHS`, shortened to what the model supports.

    Args:
        config: of the dense model.
        lengths: None for the default.

    Raises:
        ValueError: one is below 1, or longer than the model supports; learned positions must leave room for `DECODE_TOKENS`.
    """
    learned = most_positions(config)  # beyond which the decoded tokens can't be either
    most = getattr(config, "max_position_embeddings", None) if learned is None else learned - DECODE_TOKENS
    if lengths is None:
        return sorted({n if most is None else max(1, min(n, most)) for n in LENGTHS})
    for length in lengths:
        if length < 1 or (most is not None and length > most):
            limit = "at least 1" if most is None else f"between 1 and {most} for this model"
            raise ValueError(f"lengths must be {limit}, got {length}")
    return sorted(set(lengths))


def measure_conversion(
    fitted: Fitted,
    method: str,
    made: Made,
    heldout: Mapping[str, Tensor],
    *,
    name: str,
    lengths: Sequence[int] = LENGTHS,
    shares: Sequence[float] | None = None,
    plan: Plan | None = None,
    facts: Mapping[str, Any] | None = None,
    repeats: int = 5,
    batch_size: int = 4,
    tolerated: float = TOLERATED,
    keep: Callable[[ConversionReport], object] = lambda _: None,
    progress: bool = True,
) -> ConversionReport:
    """Compare what a dense model can be converted to, with the one that was chosen.

    Args:
        fitted: the dense model and its calibration.
        method: of the chosen model, one of `moh.conversion.fitted.METHODS`.
        made: the chosen model.
        heldout: name -> token ids `[n, N]`, n at least 2, that were not calibrated on.
        name: of the dense model.
        lengths: of the prompts that are timed, as `report_lengths` gives them; none for no timing. Prompts are held-out text,
            repeated where it is shorter.
        shares: of the heads, for all methods, None for `SHARES`; the chosen model's is added.
        plan: of the dense model, for what is counted.
        facts: what the report says of the calibration.
        repeats: timed rounds; in each the models take turns with the dense one.
        batch_size: blocks per forward pass.
        tolerated: as in `ConversionReport`. Models that lose more than four times as much are not timed.
        keep: is called with what is known so far, whenever it becomes more.
        progress: show progress bars (only on a terminal).

    Raises:
        ValueError: a text has fewer than two blocks, or `perplexity` or `measure_speed` raises it.
    """
    from tqdm.auto import tqdm

    for text, blocks in heldout.items():
        if len(blocks) < 2:
            raise ValueError(f"heldout must have at least 2 blocks of each text for a standard error, got 1 of {text}")
    dense: Any = fitted.adapter.model
    base = {text: perplexity(dense, b, batch_size=batch_size, progress=progress) for text, b in heldout.items()}
    totals = sorted(
        {fitted.total(share) for share in (SHARES if shares is None else shares)} | {sum(made.used)}, reverse=True
    )
    wanted = [(m, total) for m in dict.fromkeys((method, *METHODS)) for total in totals]
    wanted.remove((method, sum(made.used)))
    models: dict[int, PreTrainedModel] = {}
    cells: list[Cell] = []
    weight = next(dense.parameters())
    report = ConversionReport(
        name,
        {text: result.perplexity for text, result in base.items()},
        (),
        {} if plan is None else _counted(plan, lengths, [total / fitted.total(1.0) for total in totals]),
        {
            **(facts or {}),
            "held-out tokens": {text: blocks.numel() for text, blocks in heldout.items()},
            "processor": device_name(weight.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(weight.dtype).removeprefix("torch."),
        },
        tolerated,
        fitted.router,
    )
    bar = tqdm([(method, sum(made.used)), *wanted], desc="comparing", unit="model", disable=None if progress else True)
    for of_method, total in bar:
        one = made if not cells else fitted.make(of_method, total)
        cell = _cell(fitted, of_method, one, heldout, base, batch_size)
        if any((c.method, c.used) == (cell.method, cell.used) for c in cells):
            continue
        if not cells or cell.worst <= 4 * tolerated:
            models[len(cells)] = one.model
        cells.append(cell)
        report = replace(report, cells=tuple(cells))
        keep(report)
    if lengths:
        report = replace(report, measured={**report.measured, "timed rounds": repeats})
    tokens = torch.cat([blocks.flatten() for blocks in heldout.values()])
    for length in lengths:
        prompt = tokens.repeat(-(-length // len(tokens)))[:length][None]
        times = _times(dense, models, prompt, repeats, progress)
        for index, of_cell in times.items():
            cells[index] = replace(cells[index], times={**cells[index].times, length: of_cell})
        report = replace(report, cells=tuple(cells))
        keep(report)
    return report


def _cell(
    fitted: Fitted,
    method: str,
    made: Made,
    heldout: Mapping[str, Tensor],
    base: Mapping[str, PerplexityResult],
    batch_size: int,
) -> Cell:
    adapter = fitted.adapter
    rises = {}
    for text, blocks in heldout.items():
        with record_routing(made.model) as routing:  # layers with fixed heads too
            now = perplexity(made.model, blocks, batch_size=batch_size, progress=False)
        rises[text] = Rise(*perplexity_rise(now.block_losses, base[text].block_losses), routing.share())
    cache = sum(made.cached) / (fitted.layers * (adapter.kv_heads or adapter.num_heads))
    return Cell(method, tuple(made.used), sum(made.used) / fitted.total(1.0), cache, rises)


def _times(
    dense: PreTrainedModel, models: Mapping[int, PreTrainedModel], prompt: Tensor, repeats: int, progress: bool
) -> dict[int, Times]:
    named = {"dense": dense} | {str(index): model for index, model in models.items()}
    speeds = measure_speed(named, prompt=prompt, decode_tokens=DECODE_TOKENS, repeats=repeats, progress=progress).models
    base = speeds["dense"]
    return {
        index: Times(
            *(
                _ratio(getattr(base, phase).values, getattr(speeds[str(index)], phase).values)
                for phase in ("prefill", "decode")
            )
        )
        for index in models
    }


def _ratio(dense: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of times, from rates of the same rounds."""
    ratios = [theirs / own for theirs, own in zip(dense, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), low, high)


def _counted(plan: Plan, lengths: Sequence[int], shares: Sequence[float]) -> dict[int, dict[float, float]]:
    return {n: {share: plan.saved(share, n) for share in shares} for n in lengths}
