"""Packed blocks as a causal language model reads them: documents in one row, none of which sees another.

Positions restart with every document; from that, with no attention mask and no cache, transformers makes the
block-diagonal causal mask (FlashAttention: the documents' lengths), which every attention backend of ours takes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""The label that no loss counts."""


def packed_block(ids: NDArray[np.integer], starts: NDArray[np.integer]) -> dict[str, Tensor]:
    """One block.

    Args:
        ids: `[seq_len]` token ids of one or several documents, of which the first and the last may be cut.
        starts: ascending indices in `ids` at which documents start.

    Returns:
        int64 tensors `[seq_len]`: `input_ids`; `position_ids`, from 0 in every document and at the block's start;
        `labels`, the ids, without the first of each document, which nothing predicts.
    """
    places = np.arange(len(ids))
    begins = np.zeros(len(ids), dtype=np.int64)
    begins[starts] = starts
    labels = ids.astype(np.int64)
    labels[starts] = IGNORED
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "position_ids": torch.from_numpy(places - np.maximum.accumulate(begins)),
        "labels": torch.from_numpy(labels),
    }
