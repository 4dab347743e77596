"""Sources tokenised while they are read, for text that does not fit on the disk: the same blocks and mixture as stores.

A bounded number of blocks is read ahead and shuffled. Each sequence carries the positions of all sources after it, so that
a run resumes at the exact sequence, whatever was read ahead. With several loader processes each would read everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from moh.data.seeds import make_key
from moh.data.text.blocks import packed_block
from moh.data.text.order import Interleaving, permuted
from moh.data.text.sources import Position, Source
from moh.data.text.tokenising import DocumentTokenizer

STREAM_KEY = "stream_state"
"""Key of the resume state in an item: int64 `(i + 1, cursor of each source ...)` of sequence i."""


@dataclass(frozen=True)
class Cursor:
    """Where to resume a source: a chunk of blocks begins at a `Position` and `offset`, and `taken` of them are used.

    Attributes:
        chunk: number of the chunk, which determines its order.
        part, place, ordinal: `Position` of the document in which the chunk begins.
        offset: tokens of that document before the chunk.
        taken: blocks of the chunk that were read.
    """

    chunk: int = 0
    part: int = 0
    place: int = 0
    ordinal: int = 0
    offset: int = 0
    taken: int = 0


_Block = tuple[NDArray[Any], NDArray[Any]]
_CURSOR = len(astuple(Cursor()))


class SourceStream:
    """Endless blocks of one source, read in chunks that are shuffled; starts again at the end.

    Args:
        source: the documents.
        tokenizer: for the token ids.
        seq_len: tokens per block, which begins as a document does.
        buffer: blocks per chunk.
        key: for the order.
        cursor: where to begin.

    Attributes:
        cursor: where to resume after the last block.
    """

    def __init__(
        self, source: Source, tokenizer: DocumentTokenizer, seq_len: int, buffer: int, key: int, cursor: Cursor
    ) -> None:
        self.source, self.tokenizer, self.seq_len, self.buffer, self.key = source, tokenizer, seq_len, buffer, key
        self._room = seq_len - len(tokenizer.start)
        self.cursor = cursor

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            chunk = None
            for chunk, blocks in self._chunks(self.cursor):
                for index in range(chunk.taken, len(blocks)):
                    self.cursor = replace(chunk, taken=index + 1)
                    ids, starts = blocks[permuted(index, len(blocks), make_key(self.key, chunk.chunk))]
                    yield packed_block(ids, starts, self.tokenizer.start)
            if chunk is None:
                raise ValueError(f"{self.source.name} holds too little text for a sequence of {self.seq_len} tokens")
            self.cursor = Cursor(chunk=chunk.chunk + 1)

    def _chunks(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[_Block]]]:
        """The chunks from the cursor's to the end of the source, each with the cursor of its start."""
        size = self.buffer * self._room
        first, skipped = Position(cursor.part, cursor.place, cursor.ordinal), cursor.offset
        filled, pieces, starts = 0, [], []
        for position, ids in self.tokenizer.tokenise(self.source.documents(first)):
            offset = skipped if position == first else 0
            while offset < len(ids):
                if filled == 0:
                    cursor = replace(cursor, **position._asdict(), offset=offset)
                if offset == 0:
                    starts.append(filled)
                piece = ids[offset : offset + size - filled]
                pieces.append(piece)
                filled, offset = filled + len(piece), offset + len(piece)
                if filled == size:
                    yield cursor, _blocks(pieces, starts, self._room)
                    cursor = replace(cursor, chunk=cursor.chunk + 1, taken=0)
                    filled, pieces, starts = 0, [], []
        if filled >= self._room:
            yield cursor, _blocks(pieces, starts, self._room)


class StreamedMixture(IterableDataset[dict[str, Tensor]]):
    """The endless sequences of a run, mixed as in `StoredMixture`, each with `STREAM_KEY`.

    Args:
        sources: the documents of each source.
        weights: one per source.
        tokenizer: for the token ids.
        seq_len: tokens per sequence.
        buffer: sequences of each source that are read ahead and shuffled.
        seed: for the order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        tokenizer: DocumentTokenizer,
        *,
        seq_len: int,
        buffer: int,
        seed: int,
    ) -> None:
        self.sources, self.order = list(sources), Interleaving(tuple(weights))
        self.tokenizer, self.seq_len, self.buffer, self.seed = tokenizer, seq_len, buffer, seed
        self._state = [0] + _CURSOR * len(self.sources) * [0]
        self._skipped = 0

    def resume(self, state: Sequence[int], sequence: int) -> None:
        """Start at sequence number `sequence`.

        Args:
            state: `STREAM_KEY` of the sequence before, or of an earlier one.
            sequence: number of the first sequence to return.
        """
        if len(state) != len(self._state) or state[0] > sequence:
            raise ValueError(
                f"the stream's state {list(state)} must be of {len(self.sources)} sources and not be ahead"
            )
        self._state, self._skipped = list(state), sequence - state[0]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number, cursors = self._state[0], self._state[1:]
        streams = [
            SourceStream(
                source,
                self.tokenizer,
                self.seq_len,
                self.buffer,
                make_key(self.seed, index),
                Cursor(*cursors[index * _CURSOR : (index + 1) * _CURSOR]),
            )
            for index, source in enumerate(self.sources)
        ]
        blocks = [iter(stream) for stream in streams]
        first = number + self._skipped
        while True:
            block = next(blocks[self.order[number][0]])
            number += 1
            if number <= first:
                continue
            state = [number, *(value for stream in streams for value in astuple(stream.cursor))]
            yield {**block, STREAM_KEY: torch.tensor(state)}


def _blocks(pieces: Sequence[NDArray[Any]], document_starts: Sequence[int], length: int) -> list[_Block]:
    """Full blocks of the joined pieces, each with the indices at which its documents start."""
    row, starts = np.concatenate(pieces), np.array(document_starts, dtype=np.int64)
    found = []
    for begin in range(0, len(row) - length + 1, length):
        first, last = np.searchsorted(starts, [begin, begin + length])
        found.append((row[begin : begin + length], starts[first:last] - begin))
    return found
