"""A tokenizer made from the training text itself: byte-level BPE, for models from scratch without one.

Cached next to the token stores; the same text and size give the same tokenizer. It learns from the beginning of every
source only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moh.training.checkpoints import replacing_directory
from moh.training.tokens.sources import Source

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""Size of the smallest vocabulary: the bytes and the end of text."""

_CHARACTERS = 200_000_000  # in total; more takes long and changes next to nothing


def byte_pair_tokenizer(sources: Sequence[Source], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of these sources, cached or made now.

    Args:
        sources: the documents to learn from, up to the same number of characters of each source.
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
        left = _CHARACTERS // len(sources)
        for _, text in source.documents():
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
