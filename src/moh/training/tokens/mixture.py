"""Several token stores mixed into the sequences of a run.

Item i is the run's i-th sequence, so reading can start anywhere. The Trainer must read it in order (`SequentialSampler`),
with any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from moh.training.tokens.order import Interleaving, shuffled_block
from moh.training.tokens.store import StoredBlocks


class StoredMixture(Dataset[dict[str, Tensor]]):
    """The sequences of a run, in order; see `moh.training.tokens.order`.

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
