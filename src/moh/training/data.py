"""From texts to blocks of tokens: tokenise once, join, cut into blocks of one length.

Every block is full, so there is no padding or masking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_PER_CALL = 8  # small enough for a progress bar that moves, large enough for the tokenizer's own threads


def pack_tokens(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    eos_token_id: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Tokenise texts, end each with the end-of-text token, join them in order and cut the row into blocks.

    A block may hold the end of one text and the start of the next. An incomplete last block is dropped.

    Args:
        texts: documents, in reading order.
        tokenizer: any transformers tokenizer; no other special tokens are added.
        seq_len: tokens per block.
        eos_token_id: the token after each text; None takes the tokenizer's, if it has one.
        progress: show a progress bar (only on a terminal).

    Returns:
        `[n, seq_len]` int64.

    Raises:
        ValueError: `seq_len` below 2, or texts too short for one block.
    """
    from tqdm.auto import tqdm

    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    pieces: list[Tensor] = []
    starts = range(0, len(texts), _TEXTS_PER_CALL)
    for start in tqdm(starts, desc="tokenising", unit="batch", disable=None if progress else True, leave=False):
        batch = list(texts[start : start + _TEXTS_PER_CALL])
        # verbose=False: texts longer than the model's context are expected here
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, eos] if eos is not None else ids, dtype=torch.long))
    row = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
    blocks = len(row) // seq_len
    if blocks == 0:
        raise ValueError(f"the texts hold {len(row)} tokens, too few for one block of seq_len = {seq_len}")
    return row[: blocks * seq_len].view(blocks, seq_len)


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of tokens as a map-style data set for causal language models: `input_ids` and equal `labels` `[seq_len]`."""

    def __init__(self, blocks: Tensor) -> None:
        if blocks.ndim != 2 or blocks.dtype != torch.long:
            raise ValueError(f"blocks must be int64 of shape [n, seq_len], got {blocks.dtype} {tuple(blocks.shape)}")
        self.blocks = blocks  # [n, seq_len]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}
