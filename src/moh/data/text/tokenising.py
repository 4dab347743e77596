"""From documents to token ids as training reads them, and a tokenizer made from the text itself.

Each document is the start token if the tokenizer has one, the text, and the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moh._files import replacing_directory
from moh.data.text.blocks import start_tokens
from moh.data.text.sources import Position, Source

_CHARACTERS = 1 << 20  # about this many per call: enough for the tokenizer's threads
_DOCUMENTS = 64


class DocumentTokenizer:
    """A transformers tokenizer, with the tokens that begin and end documents.

    Args:
        tokenizer: any transformers tokenizer.

    Attributes:
        start: what the tokenizer puts before a document (`start_tokens`).
        largest_id: of the vocabulary.
        dtype: of the ids: uint16 if every id fits, else uint32.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.start = start_tokens(tokenizer)
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
        rules = {"rules": rules, "before": self.start, "after": self._after}
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def tokenise(self, documents: Iterable[tuple[Position, str]]) -> Iterator[tuple[Position, NDArray[Any]]]:
        """`(position, ids)` of every document, in order; some are read ahead."""
        for batch in _batches(iter(documents)):
            # verbose=False: texts longer than the model's context are expected here
            rows = self._tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (position, _), ids in zip(batch, rows, strict=True):
                yield position, np.array([*self.start, *ids, *self._after], dtype=self.dtype)


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


END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""Size of the smallest vocabulary: the bytes and the end of text."""

_LEARNED_CHARACTERS = 200_000_000  # in total; more takes long and changes next to nothing


def byte_pair_tokenizer(sources: Sequence[Source], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of these sources, cached or made now.

    Args:
        sources: the documents to learn from, up to the same number of characters per source.
        vocab_size: tokens, including the 256 bytes and the end of text.
        cache_dir: tokenizers are kept in `tokenizers` below it.

    Raises:
        ValueError: `vocab_size` is below `SMALLEST`, or too large for the text.
    """
    if vocab_size < SMALLEST:
        raise ValueError(
            f"model.from_scratch.vocab_size must be at least {SMALLEST} without a tokenizer, got {vocab_size}"
        )
    made_of = json.dumps([vocab_size, [source.identity() for source in sources], [s.split for s in sources]])
    directory = cache_dir / "tokenizers" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if not directory.exists():
            with replacing_directory(directory) as scratch:
                _learn(_texts(sources), vocab_size).save_pretrained(scratch)
    return AutoTokenizer.from_pretrained(directory)


def _learn(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"the text has only {found} different tokens, fewer than model.from_scratch.vocab_size = {vocab_size}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _texts(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        left = _LEARNED_CHARACTERS // len(sources)
        for _, text in source.documents():
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
