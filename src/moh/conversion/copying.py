"""Heads that copy from afar: text that shows them, and which of them have to be shared (docs/method.md, M21)."""

from __future__ import annotations

import torch
from torch import Tensor

from moh.config import MoHConfig

COPY_LENGTH = 2048
"""Shortest calibration blocks that show which heads copy from afar (`Calibrator.share_copying_heads`)."""

COPY_BLOCKS = 2
"""Blocks that end in copies."""

COPIES, COPY_TOKENS, COPY_START = 8, 48, 8
"""Copies at a block's end, the length of each, and how many of its tokens nothing foretells, as they show what is copied."""

COPY_LOSSES = ((0.65, 0.05), (0.5, 0.3))
"""Share of all heads, and what the tokens of a copy must lose without a head, in nats per token, so that it is shared with at
least that share: of few heads each one that all tokens use has to be worth more. With a smaller share than the last none is."""


def least_loss(share: float) -> float | None:
    """The bound of `COPY_LOSSES` for a share of all heads, if there is one."""
    return next((loss for least, loss in COPY_LOSSES if share >= least), None)


def with_copies(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids `[n, N]` whose end repeats `COPIES` parts of their first quarter, and the positions whose next token is foretold.

    Positions `[P]` are the same in all rows; each part's first `COPY_START` tokens are not foretold.
    """
    length, quarter = ids.shape[1], ids.shape[1] // 4
    copied = ids.clone()
    places: list[int] = []
    for number in range(COPIES):
        first = (number + 1) * (quarter - COPY_TOKENS) // (COPIES + 1)
        to = length - (COPIES - number) * COPY_TOKENS
        copied[:, to : to + COPY_TOKENS] = ids[:, first : first + COPY_TOKENS]
        places += range(to + COPY_START - 1, to + COPY_TOKENS - 1)
    return copied, torch.tensor(places)


def copying_heads(losses: Tensor, config: MoHConfig, least: float) -> list[int]:
    """Routed heads of a layer that copies need, those that they need most first, no more than a token chooses.

    Args:
        losses: `[H]`, what the tokens of copies lose by each head that is left out, in nats.
        config: of the layer.
        least: heads are needed if they lose more.
    """
    needed = [i for i in losses.argsort(descending=True).tolist() if losses[i] > least]
    return [i for i in needed if i not in config.shared_indices][: config.active_heads]
