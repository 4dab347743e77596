"""Texts as token blocks of one length: packed, packed with separate documents, or spread evenly for calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
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

    A block may hold the end of one text and the start of the next. Each is read on its own, and so begins with what the
    tokenizer puts before a text (`start_tokens`). An incomplete last block is dropped.

    Args:
        texts: documents, in reading order.
        tokenizer: any transformers tokenizer; no other special tokens are added.
        seq_len: tokens per block, its beginning included.
        eos_token_id: the token after each text; None takes the tokenizer's, if it has one.
        progress: show a progress bar (only on a terminal).

    Returns:
        `[n, seq_len]` int64.

    Raises:
        ValueError: `seq_len` below 2, or texts too short for one block.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    row = _joined(texts, tokenizer, eos_token_id, progress)
    blocks = _cut(row, start_tokens(tokenizer), seq_len)
    if len(blocks) == 0:
        raise ValueError(f"the texts hold {len(row)} tokens, too few for one block of seq_len = {seq_len}")
    return blocks


def _joined(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None, progress: bool
) -> Tensor:
    """The token ids `[T]` of all texts in order, each followed by the end-of-text token."""
    from tqdm.auto import tqdm

    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    pieces = [torch.empty(0, dtype=torch.long)]
    starts = range(0, len(texts), _TEXTS_PER_CALL)
    for start in tqdm(starts, desc="tokenising", unit="batch", disable=None if progress else True, leave=False):
        batch = list(texts[start : start + _TEXTS_PER_CALL])
        # verbose=False: texts longer than the model's context are expected here
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, eos] if eos is not None else ids, dtype=torch.long))
    return torch.cat(pieces)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its beginning-of-text token, or nothing.

    Models whose tokenizer does so (Gemma, Llama, Mistral, Phi-3) never saw a text without it, and are far worse then.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encoder_tokens(tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[int], list[int]]:
    """What an encoder's tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    if tokenizer is None:
        return [], []
    start, end = ([] if i is None else [i] for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return start, end


def _cut(row: Tensor, start: Sequence[int], seq_len: int) -> Tensor:
    """The token ids `row` `[T]` as blocks `[n, seq_len]` that all begin with `start`; an incomplete last one is dropped."""
    room = seq_len - len(start)
    blocks = len(row) // room
    starts = torch.tensor(start, dtype=torch.long).expand(blocks, -1)
    return torch.cat([starts, row[: blocks * room].view(blocks, room)], dim=1)


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


IGNORED = -100
"""The label that losses ignore."""


def packed_block(ids: NDArray[np.integer], starts: NDArray[np.integer], start: Sequence[int] = ()) -> dict[str, Tensor]:
    """One block.

    Args:
        ids: `[T]` token ids of one or several documents; the first and the last may be cut.
        starts: ascending indices in `ids` at which documents start.
        start: what the block begins with, as every document does; before a whole document it is one of its own, which
            no other token sees.

    Returns:
        int64 tensors `[len(start) + T]`: `input_ids`; `position_ids`, from 0 in every document and at the block's start;
        `labels`, the ids, but `IGNORED` for the first of each document, which nothing predicts, and for the first after
        `start`, before which its document was cut.
    """
    if start:
        ids, starts = np.concatenate([np.asarray(start, dtype=ids.dtype), ids]), starts + len(start)
    places = np.arange(len(ids))
    begins = np.zeros(len(ids), dtype=np.int64)
    begins[starts] = starts
    labels = ids.astype(np.int64)
    labels[starts] = IGNORED
    if start:
        labels[: len(start) + 1] = IGNORED
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        # the running maximum is the start of each token's document
        "position_ids": torch.from_numpy(places - np.maximum.accumulate(begins)),
        "labels": torch.from_numpy(labels),
    }


def calibration_blocks(
    calibration: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
    seq_lens: Sequence[int],
    vocab_size: int,
    *,
    bos_token_id: int | None = None,
    fewest_long: int = 0,
) -> list[Tensor]:
    """Token ids `[n, N]` of each length N, int64, at most `max_tokens` in all, spread evenly over the calibration text.

    Args:
        calibration: texts, sequences of token ids, or token ids `[n, N]` (used as they are, up to `max_tokens`).
        tokenizer: for texts; its end-of-text token, if any, goes between them, and every block begins with what it puts
            before a text (`start_tokens`).
        max_tokens: upper bound, of which each length gets an equal part; but at least one block of each.
        seq_lens: N, rising, for texts and sequences, which are joined and cut into blocks of each length. Of lengths that
            the whole text does not fill there is one block, of all of it.
        vocab_size: of the model, to check ids against.
        bos_token_id: the model's. If there is no tokenizer and all sequences begin with it, every block does.
        fewest_long: only the first length is used if there would be fewer blocks of a longer one.

    Raises:
        ValueError: no usable calibration data, no tokenizer for texts, or an id outside the vocabulary.
    """
    if max_tokens < 1 or min(seq_lens) < 2:
        raise ValueError(
            f"calibration_tokens must be at least 1 and seq_len at least 2, got {max_tokens}, {min(seq_lens)}"
        )
    if isinstance(calibration, str) or len(calibration) == 0:
        raise ValueError("calibration must be a non-empty list of texts, a list of token id lists, or ids [n, N]")
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.shape[1] == 0 or calibration.is_floating_point():
            raise ValueError(
                f"calibration must be integer token ids [n, N], got {calibration.dtype} {tuple(calibration.shape)}"
            )
        groups = [calibration.long()]
    else:
        row, start = _row(calibration, tokenizer, bos_token_id)
        lengths = sorted({min(seq_len, len(start) + len(row)) for seq_len in seq_lens})
        groups = [_cut(row, start, length) for length in lengths]
        room = max_tokens // len(groups)
        if any(min(len(blocks), room // blocks.shape[1]) < fewest_long for blocks in groups[1:]):
            del groups[1:]
    groups = [evenly_spread(b, max(1, max_tokens // len(groups) // b.shape[1])) for b in groups]
    least, most = min(int(b.min()) for b in groups), max(int(b.max()) for b in groups)
    if not 0 <= least <= most < vocab_size:
        raise ValueError(
            f"calibration must hold token ids from 0 to {vocab_size - 1}, got {least} to {most}: does the tokenizer belong to "
            "the model?"
        )
    return groups


def are_texts(calibration: object) -> bool:
    """Whether calibration is a list of texts, which need a tokenizer."""
    return isinstance(calibration, Sequence) and len(calibration) > 0 and isinstance(calibration[0], str)


def _row(
    sequences: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    bos_token_id: int | None,
) -> tuple[Tensor, list[int]]:
    """The sequences, tokenised if they are texts and joined, `[T]`, and what every block of them begins with."""
    start: list[int] = []
    if tokenizer is not None:
        start = start_tokens(tokenizer)
    elif bos_token_id is not None and all(len(s) and s[0] == bos_token_id for s in sequences):
        start = [bos_token_id]
    if are_texts(sequences):
        if tokenizer is None:
            raise ValueError("tokenizer must be given when calibration is texts and the model is an object")
        row = _joined(cast(Sequence[str], sequences), tokenizer, None, progress=False)
    else:
        owns = ([int(i) for i in sequence] for sequence in sequences)
        row = torch.tensor([i for own in owns for i in (own[len(start) :] if own[: len(start)] == start else own)])
    if len(row) < 2:
        raise ValueError(f"calibration must hold at least 2 tokens, got {len(row)}")
    return row, start


def evenly_spread(samples: Tensor, count: int) -> Tensor:
    """`count` samples, evenly spaced; all of them if there are fewer."""
    if count >= len(samples):
        return samples
    return samples[torch.linspace(0, len(samples) - 1, count).long()]
