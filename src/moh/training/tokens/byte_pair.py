"""A tokenizer made from the training text itself: byte-level BPE, for models from scratch that bring none.

Kept beside the token stores; the same text and size give the same tokenizer. Not for large corpora's last percent: it looks at
the first characters of every source.
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
"""Tokens of the smallest vocabulary: the bytes and the end of text."""

_CHARACTERS = 200_000_000  # in all; more changes next to nothing and takes long


def byte_pair_tokenizer(sources: Sequence[Source], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of these sources, made now if it was not made before.

    Args:
        sources: their documents are learned from, the same number of characters of each.
        vocab_size: tokens, the 256 bytes and the end of text among them.
        cache_dir: tokenizers are kept in `tokenizers` below it.

    Raises:
        ValueError: `vocab_size` below `SMALLEST`, or too little text for so many tokens.
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
