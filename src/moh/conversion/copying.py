"""Heads that copy from afar: text that shows them, and which of them have to be shared (docs/method.md, M21)."""

from __future__ import annotations

import torch
from torch import Tensor

from moh.config import MoHConfig

COPY_LENGTH = 2048
"""Shortest calibration blocks that show which heads copy from afar (`Calibrator.share_copying_heads`)."""

COPY_SHARE = 0.5
"""With a smaller share of all heads none is shared for copying: a layer of so few would have none left to choose."""

COPY_BLOCKS = 2
"""Blocks that end in copies."""

COPIES, COPY_TOKENS, COPY_START = 8, 48, 8
"""Copies at a block's end, the length of each, and how many of its tokens nothing foretells, as they show what is copied."""

COPY_LOSS = 0.3
"""Heads are shared if the tokens of a copy would lose more without them, in nats per token."""


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


def copying_heads(losses: Tensor, config: MoHConfig) -> list[int]:
    """Routed heads of a layer that copies need, those that they need most first, no more than a token chooses.

    Args:
        losses: `[H]`, what the tokens of copies lose by each head that is left out, in nats.
        config: of the layer.
    """
    needed = [i for i in losses.argsort(descending=True).tolist() if losses[i] > COPY_LOSS]
    return [i for i in needed if i not in config.shared_indices][: config.active_heads]
