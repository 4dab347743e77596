"""From documents to token ids for training: the start token if the tokenizer adds one, the text, the end token.

Text that looks like a special token is tokenised as the tokenizer would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moh.training.tokens.sources import Position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 1 << 20  # of documents tokenised in one call: enough for the tokenizer's threads
_DOCUMENTS = 64


class DocumentTokenizer:
    """A transformers tokenizer, with the tokens that begin and end documents.

    Args:
        tokenizer: any transformers tokenizer.

    Attributes:
        largest_id: the vocabulary's.
        dtype: of the ids: uint16 if every id fits, else uint32.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        begins = tokenizer("a")["input_ids"][:1]  # only what the tokenizer itself puts before a text
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._before = [bos] if bos is not None and begins == [bos] else []
        self._after = [eos] if eos is not None else []
        self.largest_id = max(tokenizer.get_vocab().values())
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if self.largest_id < 1 << 16 else np.uint32)

    @property
    def identity(self) -> str:
        """A hash that changes when the ids of a text could change."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            rules = {"class": type(self._tokenizer).__name__, "vocabulary": self._tokenizer.get_vocab()}
        else:
            rules = json.loads(backend.to_str())
            rules.pop("truncation", None), rules.pop("padding", None)  # left over from earlier calls
        rules = {"rules": rules, "before": self._before, "after": self._after}
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def tokenise(self, documents: Iterable[tuple[Position, str]]) -> Iterator[tuple[Position, NDArray[Any]]]:
        """`(position, ids)` of every document, in order; some are read ahead."""
        for batch in _batches(iter(documents)):
            # verbose=False: texts longer than the model's context are expected here
            rows = self._tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (position, _), ids in zip(batch, rows, strict=True):
                yield position, np.array([*self._before, *ids, *self._after], dtype=self.dtype)


def _batches(documents: Iterator[tuple[Position, str]]) -> Iterator[list[tuple[Position, str]]]:
    batch: list[tuple[Position, str]] = []
    size = 0
    while new := list(islice(documents, 1)):
        batch += new
        size += len(new[0][1])
        if len(batch) == _DOCUMENTS or size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
