"""One source of text in a recipe, as data: its place, its kind, and how much of it a run reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["auto", "text", "jsonl", "parquet", "dataset", "corpus"]

SMALLEST_SHARE = 1e-4
"""Smallest share of a source in a mixture: sources are interleaved in rounds of 10,000 sequences."""


@dataclass(frozen=True)
class SourceRecipe:
    """One source of documents.

    Args:
        path: a file; a directory, whose files of one kind are read in the order of their names; a Hugging Face data
            set (a name on the hub, or a directory made by `save_to_disk`); or the name of a built-in corpus.
        kind: "text" (.txt, .md, .html: one document per file), "jsonl" (one per line; .gz too), "parquet" (one per row),
            "dataset" (Hugging Face), "corpus" (built in), or "auto" to detect it.
        weight: share of the run's sequences that come from this source, relative to the other sources' weights.
        text_field: field or column of the text in JSONL, Parquet and data sets.
        subset: configuration of a Hugging Face data set.
        split: the data set's (default train). For other kinds, "train" leaves out every tenth document, "heldout" reads only
            those, null reads all.
    """

    path: str
    kind: Kind = "auto"
    weight: float = 1.0
    text_field: str = "text"
    subset: str | None = None
    split: str | None = None


def check_sources(sources: Sequence[SourceRecipe], *, name: str) -> None:
    """Check what needs no look at the files; messages begin with `name`.

    Raises:
        ValueError: a path is empty, or a weight is not above 0 or too small compared with the others.
    """
    for index, source in enumerate(sources):
        if not source.path:
            raise ValueError(f"{name}[{index}].path must name a file, a directory, a data set or a corpus")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{name}[{index}].weight must be a number above 0, got {source.weight} for {source.path}")
    total = sum(source.weight for source in sources)
    for index, source in enumerate(sources):
        if source.weight / total < SMALLEST_SHARE:
            raise ValueError(
                f"{name}[{index}].weight must be at least {SMALLEST_SHARE} of the sum of all weights, "
                f"got {source.weight} of {total} for {source.path}"
            )
