"""Give a language model, dense or MoH, the vocabulary of another tokenizer: what the paper does between its two stages.

A token that both tokenizers have keeps its row; a new one starts as the mean of the rows of its old pieces. A token's
text is what it stands for in the middle of a text: at the beginning some tokenizers leave out a space ("▁the" is " the").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh._files import CARD_MARK, replacing_directory
from moh.models.transformers.loading import load_causal_lm, load_tokenizer

_CARD = f"""{CARD_MARK}

A language model with the vocabulary of another tokenizer, made by `moh extend-vocabulary` of the package
mixture-of-heads. Its new rows are means of old ones: train it before use.
"""


@dataclass(frozen=True)
class ExtendedVocabulary:
    """Where the new rows came from.

    Attributes:
        kept: tokens that both tokenizers have, for the same text.
        averaged: new tokens that start as the mean of their pieces' rows.
        unspelled: new tokens that the old tokenizer can't spell (such as special ones); they start as the mean of all
            rows.
    """

    kept: int
    averaged: int
    unspelled: int


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, *, multiple_of: int = 1
) -> ExtendedVocabulary:
    """Give `model`, in place, the rows that `new` needs in its input and output embeddings, tied or not.

    Args:
        model: made for `old`; its rows beyond the old ids (padding) are dropped.
        old: the model's tokenizer.
        new: the tokenizer to use from now on; its ids may differ.
        multiple_of: round the number of rows up to a multiple; rows beyond the new ids are the mean of all rows.

    Raises:
        ValueError: the model has fewer rows than `old` has ids, or `multiple_of` is below 1.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    old_ids, new_ids = old.get_vocab(), new.get_vocab()
    embeddings = model.get_input_embeddings()
    known = max(old_ids.values()) + 1
    if known > embeddings.weight.shape[0]:
        raise ValueError(
            f"the tokenizer of the model has {known} tokens, but the model a vocabulary of {embeddings.weight.shape[0]}: "
            "is it another model's?"
        )
    pieces, counts = _pieces(old, new, old_ids, new_ids)
    rows = -(-(max(new_ids.values()) + 1) // multiple_of) * multiple_of
    used = torch.tensor(sorted(old_ids.values()))
    output = model.get_output_embeddings()
    tied = output is None or output.weight is embeddings.weight
    weights = [_extended(embeddings.weight, pieces, rows, used)]
    if not tied:
        weights.append(_extended(output.weight, pieces, rows, used))
    bias = None if output is None or output.bias is None else _extended(output.bias[:, None], pieces, rows, used)[:, 0]

    model.resize_token_embeddings(rows, mean_resizing=False)  # sets the configuration's vocab_size, ties what was tied
    model.get_input_embeddings().weight.copy_(weights[0])
    if not tied:
        model.get_output_embeddings().weight.copy_(weights[1])
    if bias is not None:
        model.get_output_embeddings().bias.copy_(bias)
    for kind in ("bos", "eos", "pad"):
        token = getattr(new, f"{kind}_token_id")
        for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
            if config is not None:
                setattr(config, f"{kind}_token_id", token)
    return counts


def extend_vocabulary_files(
    model: str,
    tokenizer: str,
    output: str | Path,
    *,
    multiple_of: int = 1,
    revision: str | None = None,
    **loading: Any,
) -> ExtendedVocabulary:
    """`extend_vocabulary` from files to files: `output` gets model and new tokenizer, whole or not at all.

    Args:
        model: directory or hub name of a model with its tokenizer; the result keeps its dtype, unless `loading` has another.
        tokenizer: directory or hub name of the new tokenizer.
        output: a new or empty directory, or one that holds nothing but a MoH model or an
            earlier result, which is replaced.
        multiple_of: as in `extend_vocabulary`.
        revision: branch, tag or commit of a model that is named on the hub.
        loading: further arguments of `load_causal_lm`.

    Raises:
        ValueError: a model or tokenizer can't be loaded or written, or they don't match.
    """
    with replacing_directory(Path(output)) as scratch:
        loaded, new = load_causal_lm(model, revision=revision, **loading), load_tokenizer(tokenizer)
        counts = extend_vocabulary(loaded, load_tokenizer(model, revision=revision), new, multiple_of=multiple_of)
        loaded.save_pretrained(scratch)
        new.save_pretrained(scratch)
        if not (card := scratch / "README.md").exists():  # a dense model: nothing else says that the directory is ours
            card.write_text(_CARD, encoding="utf-8")
    return counts


def _pieces(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, old_ids: dict[str, int], new_ids: dict[str, int]
) -> tuple[dict[int, list[int]], ExtendedVocabulary]:
    """New id -> old ids whose mean it starts as, for those that have any; and the number of each kind."""
    pieces: dict[int, list[int]] = {}
    kept = averaged = 0
    special = set(new.all_special_ids)
    old_text, new_text = _decoder(old), _decoder(new)
    for token, index in new_ids.items():
        known = old_ids.get(token)
        # the same name may stand for another text: in a byte-level vocabulary "é" is a single byte
        if known is not None and (index in special or old_text(known) == new_text(index)):
            pieces[index] = [known]
            kept += 1
        elif index not in special and (spelled := _spelled(old, new_text(index))):
            pieces[index] = spelled
            averaged += 1
    return pieces, ExtendedVocabulary(kept, averaged, len(new_ids) - kept - averaged)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Id -> what the token adds to a text that has begun."""
    for lead in ("a", "1", "."):
        begun: list[int] = tokenizer(lead, add_special_tokens=False)["input_ids"]
        text: str = tokenizer.decode(begun, clean_up_tokenization_spaces=False)
        if text:
            break

    def decode(index: int) -> str:
        whole: str = tokenizer.decode([*begun, index], clean_up_tokenization_spaces=False)
        return whole.removeprefix(text)

    return decode


def _spelled(old: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The old ids of a new token's text; none if a part of it is unknown or not a whole character."""
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return []
    ids = _ids_within(old, text)
    return [] if old.unk_token_id is not None and old.unk_token_id in ids else ids


def _ids_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text after another that it does not merge with; of the text alone if it merges with all that are tried."""
    for lead in ("\n", ".", "a"):
        begun, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (lead, lead + text))
        if begun and len(whole) > len(begun) and whole[: len(begun)] == begun:
            return list(whole[len(begun) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _extended(weight: Tensor, pieces: dict[int, list[int]], rows: int, used: Tensor) -> Tensor:
    """`[rows, C]`: the means of old rows, in float32, in the dtype and on the device of `weight`."""
    old = weight.detach().float()
    made = old[used.to(old.device)].mean(0).repeat(rows, 1)
    indices = list(pieces)
    flat = torch.tensor([piece for index in indices for piece in pieces[index]], device=old.device)
    lengths = torch.tensor([len(pieces[index]) for index in indices])
    starts = (lengths.cumsum(0) - lengths).to(old.device)
    made[torch.tensor(indices, device=old.device)] = nn.functional.embedding_bag(flat, old, starts, mode="mean")
    return made.to(weight.dtype)
