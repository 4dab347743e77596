"""Calibration text in any of the forms that users have, as blocks of token ids.

Not a data pipeline: see `moh.training.data`, which lies above this room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def calibration_blocks(
    calibration: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
    seq_len: int,
    vocab_size: int,
) -> Tensor:
    """Token ids `[n, N]`, int64, at most `max_tokens` of them, spread evenly over the calibration text.

    Args:
        calibration: texts, sequences of token ids, or token ids `[n, N]` (used as they are, up to `max_tokens`).
        tokenizer: for texts; its end-of-text token, if any, goes between them.
        max_tokens: upper bound, at least one block.
        seq_len: N, for texts and sequences, which are joined and cut into blocks.
        vocab_size: of the model, to check ids against.

    Raises:
        ValueError: nothing usable in it, no tokenizer for texts, or an id outside the vocabulary.
    """
    if max_tokens < 1 or seq_len < 2:
        raise ValueError(f"calibration_tokens must be at least 1 and seq_len at least 2, got {max_tokens}, {seq_len}")
    if isinstance(calibration, str) or len(calibration) == 0:
        raise ValueError("calibration must be a non-empty list of texts, a list of token id lists, or ids [n, N]")
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.shape[1] == 0 or calibration.is_floating_point():
            raise ValueError(
                f"calibration must be integer token ids [n, N], got {calibration.dtype} {tuple(calibration.shape)}"
            )
        blocks = calibration.long()
    else:
        blocks = _pack(calibration, tokenizer, seq_len)
    count = max(1, max_tokens // blocks.shape[1])
    blocks = evenly_spread(blocks, count)
    if not 0 <= int(blocks.min()) <= int(blocks.max()) < vocab_size:
        raise ValueError(
            f"calibration must hold token ids from 0 to {vocab_size - 1}, got {int(blocks.min())} to "
            f"{int(blocks.max())}: does the tokenizer belong to the model?"
        )
    return blocks


def are_texts(calibration: object) -> bool:
    """Whether calibration is a list of texts, for which a tokenizer is needed."""
    return isinstance(calibration, Sequence) and len(calibration) > 0 and isinstance(calibration[0], str)


def _pack(
    sequences: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None, seq_len: int
) -> Tensor:
    """The sequences, tokenised if they are texts and joined, as `[n, seq_len]`; a single shorter block if too few."""
    ids: list[int] = []
    for sequence in sequences:
        if isinstance(sequence, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given when calibration is texts and the model is an object")
            ids.extend(tokenizer(sequence, add_special_tokens=False).input_ids)
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
        else:
            ids.extend(int(i) for i in sequence)
    if len(ids) < 2:
        raise ValueError(f"calibration must hold at least 2 tokens, got {len(ids)}")
    seq_len = min(seq_len, len(ids))
    usable = len(ids) // seq_len * seq_len
    return torch.tensor(ids[:usable]).view(-1, seq_len)


def evenly_spread(samples: Tensor, count: int) -> Tensor:
    """So many of the samples, from the first to the last of them; all where there are no more."""
    if count >= len(samples):
        return samples
    return samples[torch.linspace(0, len(samples) - 1, count).long()]
