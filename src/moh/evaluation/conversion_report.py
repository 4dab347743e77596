"""What converting one language model gives: quality, cache and time of routed, fixed and dropped heads, and a recommendation.

All models are made from one calibration (`moh.conversion.fitted`) and measured on text that it has not seen. Pages are in
`conversion_page`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh.conversion.fitted import DROPPED, DROPPED_LINEAR, FIXED_HEADS, MIXED, ROUTED, Fitted, Made
from moh.conversion.plan import Plan
from moh.evaluation.perplexity import PerplexityResult, perplexity, perplexity_rise
from moh.evaluation.speed import device_name, measure_speed
from moh.models.transformers.families import most_positions
from moh.routing import record_routing

SHARES = (0.9, 0.75, 0.6, 0.5)
"""Shares of the heads at which every method is measured, besides that of the model itself."""

METHODS = (ROUTED, FIXED_HEADS, DROPPED_LINEAR)
"""Methods that are compared, besides that of the model itself."""

AVERAGES = (ROUTED, MIXED)
"""Methods by which a token may use other numbers of heads than another one, so that the share is an average."""

OPTIONS = {
    ROUTED: "",
    MIXED: " --layers mix",
    FIXED_HEADS: " --router fixed",
    DROPPED_LINEAR: " --layers drop",
    DROPPED: " --layers drop --no-refit-output",
}
"""What `moh convert` takes for each method."""

LENGTHS = (512, 2_048, 8_192)
"""Tokens of the prompts that are timed by default."""

DECODE_TOKENS = 16
"""New tokens that are timed after each prompt."""

TOLERATED = 5.0
"""Largest rise of the perplexity, in percent on the worst text, that is recommended."""

NOTICEABLE = 0.02
"""A gain of time that is smaller is not counted as one."""


@dataclass(frozen=True)
class Rise:
    """How far the perplexity on a text is above the dense model's, and its standard error over blocks, in percent.

    Attributes:
        above: in percent.
        stderr: in percent.
        share: of all heads that the text's tokens used, the average over them; that of `Cell` is one over the calibration's.
    """

    above: float
    stderr: float
    share: float


@dataclass(frozen=True)
class Ratio:
    """Time relative to the dense model's, in the same round: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @property
    def gains(self) -> bool:
        """Whether the model is faster in most rounds, and noticeably."""
        return self.high < 1 and 1 - self.median >= NOTICEABLE


@dataclass(frozen=True)
class Times:
    """Reading a prompt and decoding after it."""

    prefill: Ratio
    decode: Ratio


@dataclass(frozen=True)
class Cell:
    """One model of the comparison.

    Attributes:
        method: one of `moh.conversion.fitted.METHODS`.
        used: heads of each layer.
        share: of all heads; where they are routed, what the calibration's tokens used on average.
        cache: of keys and values, as a share of the dense model's.
        rises: by text.
        times: by length of the prompt.
    """

    method: str
    used: tuple[int, ...]
    share: float
    cache: float
    rises: Mapping[str, Rise]
    times: Mapping[int, Times] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """Rise of the perplexity on the text that loses most, in percent."""
        return max(rise.above for rise in self.rises.values())


@dataclass(frozen=True)
class ConversionReport:
    """The comparison, as far as it was measured.

    Attributes:
        name: of the dense model.
        dense: its perplexity on each text.
        cells: the models; the first is the converted one.
        counted: share of the multiplications that routed heads save at most, by length and share of the heads.
        measured: sizes of the measurement, machine and software, as printed.
        tolerated: largest rise of the perplexity that is recommended, in percent.
        router: of routed layers.
    """

    name: str
    dense: Mapping[str, float]
    cells: tuple[Cell, ...]
    counted: Mapping[int, Mapping[float, float]]
    measured: Mapping[str, Any]
    tolerated: float = TOLERATED
    router: str = "threshold"

    @property
    def lengths(self) -> list[int]:
        """Lengths that were timed, ascending."""
        return sorted({length for cell in self.cells for length in cell.times})

    def ordered(self) -> list[Cell]:
        """The cells by method and falling share."""
        methods = list(OPTIONS)
        return sorted(self.cells, key=lambda cell: (methods.index(cell.method), -cell.share))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"recommendation": self.recommendation()}

    def recommended(self) -> Cell | None:
        """The model that saves most time at the longest prompt of those that lose no more than is tolerated.

        None keeps the dense model: all lose more, or none of them gains time, or no time was measured.
        """
        gaining = [cell for cell in self._tolerated() if any(_gains(times) for times in cell.times.values())]
        longest = max(self.lengths, default=0)
        return min(gaining, key=lambda cell: (cell.times[longest].prefill.median, cell.worst), default=None)

    def recommendation(self) -> str:
        """What to do, and why, in a few sentences."""
        if not self.cells:
            return "Nothing was measured yet."
        tolerated = self._tolerated()
        if not tolerated:
            least = min(self.cells, key=lambda cell: cell.worst)
            return (
                f"Keep the dense model: all of the models lose more than {self.tolerated:g} % of perplexity. The least, "
                f"{_percent(least.worst)}, is lost by {_named(least)}. More calibration text, of the kind that the model is "
                "for, makes it less."
            )
        if not self.lengths:
            fewest = min(tolerated, key=lambda cell: cell.share)
            return (
                f"No time was measured. Of the models that lose at most {self.tolerated:g} % of perplexity, {_named(fewest)} "
                f"use the fewest heads ({_rises(fewest)})."
            )
        best = self.recommended()
        if best is None:
            return (
                f"Keep the dense model: none of those that lose at most {self.tolerated:g} % of perplexity is noticeably "
                f"faster with {_lengths(self.lengths)} tokens on this machine."
            )
        sentences = [
            f"Take {_named(best)} (`moh convert --share {best.share:.6g}{self._options(best.method)}`): perplexity rises by "
            f"{_rises(best)}, within the {self.tolerated:g} % that this page tolerates.",
            *self._on_time(best),
            *self._on_others(best),
        ]
        return " ".join(sentences)

    def _options(self, method: str) -> str:
        """What `moh convert` takes to make such a model again."""
        router = f" --router {self.router}" if method in AVERAGES and self.router != "threshold" else ""
        return router + OPTIONS[method]

    def _tolerated(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.worst <= self.tolerated]

    def _on_time(self, cell: Cell) -> Iterator[str]:
        for phase, subject in (("prefill", "Reading a prompt"), ("decode", "Decoding a token")):
            ratios: dict[int, Ratio] = {n: getattr(times, phase) for n, times in sorted(cell.times.items())}
            some, none = ({n: r for n, r in ratios.items() if r.gains is gains} for gains in (True, False))
            parts = []
            if some:
                parts.append(f"takes {_each(some)} of the dense model's time with {_lengths(some)} tokens")
            if none:
                parts.append(f"gains nothing with {_lengths(none)} tokens ({_each(none)})")
            yield f"{subject} {' and '.join(parts)}."

    def _on_others(self, best: Cell) -> Iterator[str]:
        """The other methods at the nearest share."""
        for method in dict.fromkeys(cell.method for cell in self.cells):
            if method != best.method:
                near = min((c for c in self.cells if c.method == method), key=lambda cell: abs(cell.share - best.share))
                yield f"With {_named(near)} it rises by {_rises(near)}."


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


def _gains(times: Times) -> bool:
    return times.prefill.gains or times.decode.gains


def label(method: str) -> str:
    """A method as pages name it."""
    return "routed heads" if method == ROUTED else method


def _named(cell: Cell) -> str:
    return f"{label(cell.method)} at {cell.share:.0%}"


def _rises(cell: Cell) -> str:
    return _list([f"{rise.above:+.1f} ± {rise.stderr:.1f} % on {text}" for text, rise in cell.rises.items()])


def _percent(value: float) -> str:
    return f"{value:+.1f} %"


def _lengths(lengths: Iterable[int]) -> str:
    return _list([f"{length:,}" for length in lengths])


def _each(ratios: Mapping[int, Ratio]) -> str:
    return _list([f"{ratio.median:.2f}" for ratio in ratios.values()])


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
