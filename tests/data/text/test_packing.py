"""Texts become full blocks of tokens, in order, with an end-of-text token after each."""

from __future__ import annotations

import pytest
import torch

from moh.training import TokenBlocks, pack_tokens


def test_blocks_hold_the_texts_in_order_each_followed_by_the_end_token(tokenizer) -> None:
    texts = ["the head reads .", "a token", "the value of the router"]
    row = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert len(row) == 14
    blocks = pack_tokens(texts, tokenizer, seq_len=4)
    assert blocks.dtype == torch.long
    assert blocks.tolist() == [row[0:4], row[4:8], row[8:12]]  # the last two tokens are dropped


def test_more_texts_than_are_tokenised_at_once_stay_in_order(tokenizer) -> None:
    texts = [f"the head {'reads ' * (i % 5)}." for i in range(40)]
    expected = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    packed = pack_tokens(texts, tokenizer, seq_len=2).flatten().tolist()
    assert packed == expected[: len(packed)]
    assert len(expected) - len(packed) < 2


def test_another_end_token_can_be_given(tokenizer) -> None:
    assert pack_tokens(["the head"], tokenizer, seq_len=3, eos_token_id=7)[0, -1] == 7


def test_every_block_begins_as_the_tokenizer_begins_a_text(bos_tokenizer) -> None:
    texts = ["the head reads .", "a token", "the value of the router"]
    bos, eos = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    row = [i for text in texts for i in [*bos_tokenizer(text)["input_ids"][1:], eos]]
    assert len(row) == 14 and bos not in row
    blocks = pack_tokens(texts, bos_tokenizer, seq_len=4)
    assert blocks.tolist() == [[bos, *row[i : i + 3]] for i in range(0, 12, 3)]
    with pytest.raises(ValueError, match="hold 14 tokens, too few for one block of seq_len = 16"):
        pack_tokens(texts, bos_tokenizer, seq_len=16)


@pytest.mark.parametrize(
    ("texts", "seq_len", "message"),
    [
        (["the head"], 4, "hold 3 tokens, too few for one block of seq_len = 4"),
        ([], 4, "hold 0 tokens"),
        (["the"], 1, "seq_len must be at least 2, got 1"),
    ],
)
def test_texts_too_short_for_a_block_are_an_error(tokenizer, texts, seq_len, message) -> None:
    with pytest.raises(ValueError, match=message):
        pack_tokens(texts, tokenizer, seq_len=seq_len)


def test_the_data_set_gives_inputs_and_equal_labels() -> None:
    blocks = torch.arange(6).view(3, 2)
    data = TokenBlocks(blocks)
    assert len(data) == 3
    assert data[1]["input_ids"].tolist() == data[1]["labels"].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"int64 of shape \[n, seq_len\], got torch.int64 \(6,\)"):
        TokenBlocks(blocks.flatten())
