"""The order of a run's sequences as a function of their index: nothing is stored, so a run resumes anywhere at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from moh.data.seeds import make_key, mixed
from moh.data.text.store import StoredBlocks

ROUND = 10_000
"""Sequences after which the interleaving of the sources repeats: weights are met to one part in this many."""

_ROUNDS = 6  # of the Feistel network; four already look random, two more for very small domains


def permuted(index: int, size: int, key: int) -> int:
    """The place of `index` in a permutation of `range(size)` chosen by `key`.

    A Feistel network over the next even number of bits; results outside the range are fed back in. The network is a
    bijection, so this ends and no two indices share a place.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for step in range(_ROUNDS):  # each with its own key; the constant is 2^64 / golden ratio, as in splitmix64
            left, right = right, left ^ (mixed(key + step * 0x9E3779B97F4A7C15 + right) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class Interleaving:
    """Which source the i-th sequence of a run comes from, and how many of that source came before.

    In a round of `ROUND` sequences every source has its exact share, evenly spread.

    Args:
        weights: one per source, above 0; only their ratios matter.
    """

    weights: Sequence[float]
    quotas: tuple[int, ...] = field(init=False)
    _source: NDArray[np.int32] = field(init=False, repr=False)  # [ROUND]
    _before: NDArray[np.int32] = field(init=False, repr=False)  # [ROUND], of the same source

    def __post_init__(self) -> None:
        quotas = _quotas(self.weights)
        rank = np.concatenate([np.arange(quota) for quota in quotas])
        source = np.repeat(np.arange(len(quotas)), quotas)
        # a source's turns come at (2 rank + 1) / (2 quota) of the round; compared as integers, times 2^41
        turn = (2 * rank + 1) * (np.int64(2) ** 40 // np.array(quotas)[source])
        order = np.lexsort((source, turn))
        object.__setattr__(self, "quotas", quotas)
        object.__setattr__(self, "_source", source[order].astype(np.int32))
        object.__setattr__(self, "_before", rank[order].astype(np.int32))

    def __getitem__(self, index: int) -> tuple[int, int]:
        """`(source, how many sequences of that source come before)` of the sequence `index`."""
        number, place = divmod(index, ROUND)
        source = int(self._source[place])
        return source, number * self.quotas[source] + int(self._before[place])


def _quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """`ROUND` split into whole parts in the ratio of the weights, by largest remainders; at least 1 each."""
    exact = [weight / sum(weights) * ROUND for weight in weights]
    quotas = [max(1, int(part)) for part in exact]
    by_need = sorted(range(len(weights)), key=lambda s: (quotas[s] - exact[s], s))
    for source in by_need[: max(0, ROUND - sum(quotas))]:
        quotas[source] += 1
    quotas[quotas.index(max(quotas))] += ROUND - sum(quotas)  # 0 unless a quota was raised to 1
    return tuple(quotas)


def shuffled_block(draw: int, blocks: int, *, seed: int, source: int) -> int:
    """Which of a source's `blocks` its `draw`-th sequence is: every block once per epoch, in a new order each time."""
    epoch, index = divmod(draw, blocks)
    return permuted(index, blocks, make_key(seed, source, epoch))


class StoredMixture(Dataset[dict[str, Tensor]]):
    """The sequences of a run, in order; see `moh.data.text.order`.

    Args:
        sources: the blocks of each source.
        weights: one per source.
        seed: for the order within the sources.
        length: sequences of the whole run; a source that is used up starts again in another order.
    """

    def __init__(self, sources: Sequence[StoredBlocks], weights: Sequence[float], *, seed: int, length: int) -> None:
        self.sources = list(sources)
        self.order = Interleaving(tuple(weights))
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        source, draw = self.order[index]
        blocks = self.sources[source]
        return blocks[shuffled_block(draw, len(blocks), seed=self.seed, source=source)]
