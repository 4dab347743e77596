"""Inputs in labelled groups, as batches with a forward pass and losses, for models of any family; and groups of texts.

`image_groups` and `diffusion_groups` make groups of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from moh.models.transformers.families import is_text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GroupBatch:
    """B inputs and how to run the model on them.

    Attributes:
        groups: `[B]` int64, the group of each input.
        units: `[B]` int64, the unit of each input, such as the text of a passage. Tests exchange whole units.
        run: one forward pass over the batch.
        losses: the loss of each input, `[B]` float32, in another forward pass.
        counted: `[B, N]` bool, the tokens that count (padding does not); None counts all.
    """

    groups: Tensor
    units: Tensor
    run: Callable[[], object]
    losses: Callable[[], Tensor]
    counted: Tensor | None = None


@dataclass(frozen=True)
class GroupedInputs:
    """Inputs of G groups, read again at each call of `batches`.

    Attributes:
        names: of the groups.
        batches: yields all inputs, batch by batch.
        count: number of batches.
    """

    names: tuple[str, ...]
    batches: Callable[[], Iterator[GroupBatch]]
    count: int

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("at least one group is needed, got none")
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"groups must have different names, got {twice!r} twice")


@dataclass(frozen=True)
class _Passage:
    group: int
    unit: int
    ids: Tensor  # [n]


def text_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    seq_len: int = 512,
    max_tokens: int = 8_192,
    batch_size: int = 4,
) -> GroupedInputs:
    """Passages of each group's texts, each read by itself and so begun as the tokenizer begins a text.

    If a group has more texts than the number of passages needed, its texts are sampled evenly and each gives its middle
    passage (beginnings are often titles and licences); otherwise each gives several passages, evenly spread. In tests a
    text with its passages is one unit. If any group has a single text, every passage is a unit; a difference is then one
    between these texts, not between kinds of text.

    Args:
        model: a causal language model or an encoder of text, MoH or dense.
        tokenizer: the model's.
        texts: name of the group -> its texts, at least one.
        seq_len: most tokens of a passage.
        max_tokens: most tokens of a group.
        batch_size: passages per forward pass.

    Raises:
        ValueError: a group has no text, a text has fewer than two tokens, or a size is out of range.
    """
    if seq_len < 2 or max_tokens < seq_len:
        raise ValueError(f"seq_len must be at least 2 and max_tokens at least seq_len, got {seq_len}, {max_tokens}")
    from moh.data.text.blocks import encoder_tokens, start_tokens  # need transformers, this module does not

    before, after = encoder_tokens(tokenizer) if is_text_encoder(model.config) else (start_tokens(tokenizer), [])
    if seq_len < len(before) + len(after) + 2:
        raise ValueError(f"seq_len must leave room for two tokens besides the tokenizer's own, got {seq_len}")
    start, end = (torch.tensor(ids, dtype=torch.long) for ids in (before, after))
    single = any(len(group) < 2 for group in texts.values())
    passages: dict[str, list[_Passage]] = {}
    unit = 0
    for number, (name, group) in enumerate(texts.items()):
        if not group:
            raise ValueError(f"group {name!r} must hold at least one text, got none")
        wanted = max_tokens // seq_len
        chosen = [group[place] for place in _spread(len(group), wanted)]
        found = passages.setdefault(name, [])
        for text in chosen:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) < 2:
                raise ValueError(f"a text of group {name!r} must have at least 2 tokens, got {text[:40]!r}")
            room = seq_len - len(start) - len(end)
            pieces = torch.tensor(ids).split(room)
            pieces = pieces[:-1] if len(pieces) > 1 and len(pieces[-1]) < room else pieces  # a short rest is left out
            for place in _spread(len(pieces), max(1, wanted // len(chosen))):
                found.append(_Passage(number, unit, torch.cat([start, pieces[place], end])))
                unit += single
            unit += not single
    return _grouped(model, passages, batch_size)


def token_groups(model: PreTrainedModel, blocks: Mapping[str, Tensor], *, batch_size: int = 4) -> GroupedInputs:
    """Groups of token blocks, as from `moh.training.pack_tokens`; each block is a unit.

    Args:
        model: a causal language model, MoH or dense.
        blocks: name of the group -> `[n, seq_len]` token ids, n >= 1, seq_len >= 2.
        batch_size: blocks per forward pass.

    Raises:
        ValueError: blocks are not `[n, seq_len]`, or `batch_size` is below 1.
    """
    passages: dict[str, list[_Passage]] = {}
    unit = 0
    for number, (name, group) in enumerate(blocks.items()):
        if group.dim() != 2 or len(group) < 1 or group.shape[1] < 2:
            raise ValueError(
                f"blocks of group {name!r} must be token ids [n, seq_len] with n >= 1 and seq_len >= 2, "
                f"got shape {tuple(group.shape)}"
            )
        passages[name] = [_Passage(number, unit + place, ids) for place, ids in enumerate(group)]
        unit += len(group)
    return _grouped(model, passages, batch_size)


def _grouped(model: PreTrainedModel, passages: Mapping[str, list[_Passage]], batch_size: int) -> GroupedInputs:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # Groups in turn, so that even the first batches hold all of them
    order = [passage for turn in zip_longest(*passages.values()) for passage in turn if passage is not None]
    starts = range(0, len(order), batch_size)

    def batches() -> Iterator[GroupBatch]:
        for start in starts:
            yield _batch(model, order[start : start + batch_size])

    return GroupedInputs(tuple(passages), batches, len(starts))


def _batch(model: PreTrainedModel, passages: Sequence[_Passage]) -> GroupBatch:
    longest = max(len(passage.ids) for passage in passages)
    ids = torch.stack([F.pad(passage.ids, (0, longest - len(passage.ids))) for passage in passages])  # [B, N]
    lengths = torch.tensor([len(passage.ids) for passage in passages])
    real = torch.arange(longest) < lengths[:, None]  # [B, N]
    ids, encodes = ids.to(model.device), is_text_encoder(model.config)

    def run() -> object:
        if encodes:
            return model.base_model(input_ids=ids, attention_mask=real.long().to(ids.device))
        # Padding is at the end, where causal attention hides it from real tokens: no mask is needed
        return model.get_decoder()(input_ids=ids, use_cache=False)

    def losses() -> Tensor:
        if encodes:
            raise ValueError(f"a {type(model).__name__} predicts no next token, so that its inputs have no losses")
        logits = model(input_ids=ids, use_cache=False).logits
        rows = zip(logits, ids, lengths.tolist(), strict=True)
        return torch.stack([F.cross_entropy(row[: n - 1].float(), target[1:n]) for row, target, n in rows])

    return GroupBatch(
        groups=torch.tensor([passage.group for passage in passages]),
        units=torch.tensor([passage.unit for passage in passages]),
        run=run,
        losses=losses,
        counted=None if bool(real.all()) else real,
    )


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` places, each in the middle of one of `count` equal parts."""
    count = min(count, total)
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]
