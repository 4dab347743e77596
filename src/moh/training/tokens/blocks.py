"""Packed blocks for causal language models: documents in one row, none of which sees another.

Positions restart with every document. From them, without attention mask and cache, transformers makes the block-diagonal
causal mask (FlashAttention: the documents' lengths), which all our attention backends take.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""The label that losses ignore."""


def packed_block(ids: NDArray[np.integer], starts: NDArray[np.integer]) -> dict[str, Tensor]:
    """One block.

    Args:
        ids: `[seq_len]` token ids of one or several documents; the first and the last may be cut.
        starts: ascending indices in `ids` at which documents start.

    Returns:
        int64 tensors `[seq_len]`: `input_ids`; `position_ids`, from 0 in every document and at the block's start;
        `labels`, the ids, but `IGNORED` for the first of each document, which nothing predicts.
    """
    places = np.arange(len(ids))
    begins = np.zeros(len(ids), dtype=np.int64)
    begins[starts] = starts
    labels = ids.astype(np.int64)
    labels[starts] = IGNORED
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        # the running maximum is the start of each token's document
        "position_ids": torch.from_numpy(places - np.maximum.accumulate(begins)),
        "labels": torch.from_numpy(labels),
    }
