"""Perplexity of a causal language model on blocks of tokens, with its standard error.

Each block is read on its own: its first token is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from moh._modes import evaluating
from moh.models.transformers.families import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp(loss).
        loss: mean negative log-likelihood per predicted token, in nats.
        tokens: predicted tokens.
        stderr: standard error of `loss`, from the spread between blocks; NaN for a single block.
        block_losses: mean loss of each block, for paired comparisons of two models.
    """

    perplexity: float
    loss: float
    tokens: int
    stderr: float
    block_losses: tuple[float, ...]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, blocks: Tensor, *, batch_size: int = 4, progress: bool = True
) -> PerplexityResult:
    """Measure `exp(mean of -log p(token | those before it in its block))`.

    Args:
        model: any transformers causal language model; run in evaluation mode, its own mode is restored.
        blocks: `[n, seq_len]` token ids, as `moh.training.pack_tokens` makes them.
        batch_size: blocks per forward pass.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: there is no block, blocks have fewer than 2 tokens or more than the model takes, or `batch_size` is
            below 1.
    """
    from tqdm.auto import tqdm

    if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise ValueError(f"blocks must be [n, seq_len] with n >= 1 and seq_len >= 2, got {tuple(blocks.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_positions(model.config, blocks.shape[1], name="seq_len")
    losses: list[Tensor] = []
    with evaluating(model):
        batches = blocks.split(batch_size)
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=None if progress else True, leave=False):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits  # [B, N, V]
            # one block at a time: the whole batch's logits in float32 would take too much memory
            losses += [F.cross_entropy(row[:-1].float(), ids[1:]) for row, ids in zip(logits, batch, strict=True)]
    means = torch.stack(losses).double().cpu()  # [n]; all blocks have the same length
    loss, n = float(means.mean()), len(means)
    stderr = float(means.std()) / math.sqrt(n) if n > 1 else math.nan
    return PerplexityResult(math.exp(loss), loss, n * (blocks.shape[1] - 1), stderr, tuple(means.tolist()))


def perplexity_rise(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """How far one model's perplexity is above another's on the same blocks: (percent, its standard error).

    Args:
        losses: `block_losses` of the model.
        base: `block_losses` of the other model.
    """
    rises = torch.tensor(losses) - torch.tensor(base)  # paired: the blocks' own difficulty cancels
    return 100 * math.expm1(float(rises.mean())), 100 * float(rises.std() / math.sqrt(len(rises)))
