"""What a trade-off curve consists of: a point for each budget, and the dense model's. Plain data; `curve` measures it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        dense: the same of a dense model (share 1, no `active_heads`); None if none was given.
    """

    points: tuple[Point, ...]
    measured: dict[str, Any]
    dense: Point | None = None

    def rows(self) -> list[dict[str, object]]:
        """One flat row per point, without what was not measured; the dense model's last, its `active_heads` "dense"."""
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
