"""What converting one language model gives: quality, cache and time of routed, fixed and dropped heads, and a recommendation.

`conversion_measure` fills it, `conversion_page` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moh.conversion.fitted import DROPPED, DROPPED_LINEAR, FIXED_HEADS, MIXED, ROUTED

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
