"""From a recipe's data to what the Trainer reads: the sequences of the whole run, the held-out ones, a sample to calibrate on.

Handles both kinds of recipes: a corpus in memory (`moh.data.text.blocks`), and sources with weights, stored or streamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from moh.data.text.blocks import TokenBlocks, pack_tokens
from moh.data.text.corpora import Corpus, corpus_from_files, default_cache_dir, load_corpus
from moh.data.text.order import ROUND, StoredMixture
from moh.data.text.readers import SourceRecipe, Texts
from moh.data.text.sources import Source, open_source
from moh.data.text.store import StoredBlocks, open_store
from moh.data.text.streaming import StreamedMixture
from moh.data.text.tokenising import DocumentTokenizer
from moh.training.language.recipe import DataRecipe, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

_Row = Tensor | NDArray[Any]


@dataclass(frozen=True)
class TrainingText:
    """What a run reads.

    Attributes:
        train: the training sequences; a `StoredMixture` or `StreamedMixture` is in the order of the run.
        heldout: the sequences to evaluate on, or None.
        identity: what the sequences were made of, by source; empty for a corpus, which is split and read whole.
        consecutive: whether `TokenBlocks` follow each other in the text.
    """

    train: Dataset[dict[str, Tensor]]
    heldout: Dataset[dict[str, Tensor]] | None
    identity: Mapping[str, Any] = field(default_factory=dict)
    consecutive: bool = False

    def calibration(self, tokens: int, length: int, start: Sequence[int]) -> Tensor | list[list[int]]:
        """What a conversion reads: blocks that need not be consecutive as they are, else passages of running text.

        Each source gives its part by weight, in passages that are evenly spread over it, or all of it if it holds less; a
        stream gives its beginning.

        Args:
            tokens: of all passages together.
            length: tokens per passage. Full ones come first, so that blocks of this length, cut from the passages in a
                row, are running text, up to where the sources' remainders meet.
            start: what the tokenizer puts before a text; every passage begins with it.
        """
        if isinstance(self.train, TokenBlocks) and not self.consecutive:
            return self.train.blocks
        room = length - len(start)
        passages = [passage for row, part in self._rows(tokens, len(start)) for passage in _spread(row, part, room)]
        passages.sort(key=lambda passage: len(passage) < room)
        return [[*start, *passage.tolist()] for passage in passages]

    def _rows(self, tokens: int, started: int) -> list[tuple[_Row, int]]:
        """The text `[T]` of each source, of a stream no more than is needed, and how many of `tokens` it is to give.

        `started` is the number of tokens that blocks of a corpus begin with.
        """
        if isinstance(self.train, TokenBlocks):
            return [(self.train.blocks[:, started:].flatten(), tokens)]
        assert isinstance(self.train, (StoredMixture, StreamedMixture))
        parts = [-(-tokens * quota // ROUND) for quota in self.train.order.quotas]
        if isinstance(self.train, StoredMixture):
            return [(blocks.store.tokens, part) for blocks, part in zip(self.train.sources, parts, strict=True)]
        tokenizer = self.train.tokenizer
        return [(_beginning(s, tokenizer, part), part) for s, part in zip(self.train.sources, parts, strict=True)]


def prepare_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments) -> TrainingText:
    """Read, fetch or tokenise the data of a recipe; under torchrun one process does the work.

    Args:
        recipe: the run.
        tokenizer: the model's.
        arguments: the Trainer's; batch and accumulation determine how many sequences the run reads.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: a source is missing, too short, or can't be read or fetched.
    """
    data = recipe.data
    if not data.sources:
        return _corpus_text(data, tokenizer, arguments)
    if data.streaming and arguments.dataloader_num_workers > 1:
        raise ValueError(
            "training.extra.dataloader_num_workers must be 0 or 1 with data.streaming: a stream is read by one process, "
            f"got {arguments.dataloader_num_workers}"
        )
    cache_dir = cache_directory(data)
    documents = DocumentTokenizer(tokenizer)
    show = arguments.process_index == 0
    with arguments.main_process_first(desc="opening the text"):  # fetches what is missing
        sources = open_sources(data)
        heldout = open_sources(data, heldout=True)
    held = [StoredBlocks(open_store(s, documents, cache_dir, progress=show), data.seq_len) for s in heldout]
    evaluated: Dataset[dict[str, Tensor]] | None = ConcatDataset(held) if held else None
    weights = [source.weight for source in data.sources]
    if data.streaming:
        stream = StreamedMixture(
            sources, weights, documents, seq_len=data.seq_len, buffer=data.stream_buffer, seed=arguments.data_seed
        )
        return TrainingText(
            stream, evaluated, _by_name(sources, [[documents.identity, *source.identity()] for source in sources])
        )
    stores = [open_store(source, documents, cache_dir, progress=show) for source in sources]
    batch = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    mixture = StoredMixture(
        [StoredBlocks(store, data.seq_len) for store in stores],
        weights,
        seed=arguments.data_seed,
        length=arguments.max_steps * batch,
    )
    return TrainingText(mixture, evaluated, _by_name(sources, [store.digest for store in stores]))


def open_sources(data: DataRecipe, *, heldout: bool = False) -> list[Source]:
    """The sources of a recipe; if it has none, its corpus as a source."""
    if not data.sources:
        corpus = load_text(data)
        return [Source(SourceRecipe(corpus.name, kind="corpus"), [Texts(corpus.heldout if heldout else corpus.train)])]
    name = "heldout_sources" if heldout else "sources"
    return [
        open_source(
            source, name=f"data.{name}[{index}]", cache_dir=data.cache_dir, streaming=data.streaming and not heldout
        )
        for index, source in enumerate(getattr(data, name))
    ]


def load_text(data: DataRecipe) -> Corpus:
    """The corpus of a recipe without sources, split."""
    if data.files:
        return corpus_from_files(data.files, data.heldout_files)
    return load_corpus(data.corpus, data.cache_dir)


def cache_directory(data: DataRecipe) -> Path:
    """Where a recipe's fetched texts and tokens are kept."""
    return Path(data.cache_dir) if data.cache_dir is not None else default_cache_dir()


def _spread(row: _Row, tokens: int, length: int) -> list[_Row]:
    """`tokens` of a row, or all, in passages of `length` and a shorter last one, with equal gaps between them."""
    tokens = min(tokens, len(row))
    count = -(-tokens // length)
    gaps = np.linspace(0, len(row) - tokens, count).astype(int)  # before each passage, in all
    sizes = [min(length, tokens - index * length) for index in range(count)]
    begins = gaps + length * np.arange(count)
    return [row[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]


def _beginning(source: Source, tokenizer: DocumentTokenizer, tokens: int) -> NDArray[Any]:
    """The first `tokens` of a source, or all of it if it holds fewer."""
    pieces, found = [np.empty(0, dtype=tokenizer.dtype)], 0
    for _, ids in tokenizer.tokenise(source.documents()):
        pieces.append(ids)
        found += len(ids)
        if found >= tokens:
            break
    return np.concatenate(pieces)[:tokens]


def _by_name(sources: Sequence[Source], identities: Sequence[Any]) -> dict[str, Any]:
    return {f"{index}: {s.name}": identity for index, (s, identity) in enumerate(zip(sources, identities, strict=True))}


def _corpus_text(data: DataRecipe, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments) -> TrainingText:
    with arguments.main_process_first(desc="fetching the text"):
        corpus = load_text(data)
    show = arguments.process_index == 0
    train, heldout = (
        pack_tokens(texts, tokenizer, seq_len=data.seq_len, progress=show) for texts in (corpus.train, corpus.heldout)
    )
    return TrainingText(TokenBlocks(train), TokenBlocks(heldout), consecutive=True)
