"""A model gets another tokenizer's vocabulary: known tokens keep their rows, new ones get the mean of their pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moh import convert
from moh.cli.main import main
from moh.training.language.vocabulary import ExtendedVocabulary, extend_vocabulary

OLD = ["<eos>", "a", "b", "c", "ab", "d"]
NEW = ["<eos>", "<pad>", "c", "b", "a", "ab", "abc", "bb", "cab", "z"]  # other ids, "d" is gone, "z" can't be spelled


def _tokenizer(tokens: list[str], merges: list[tuple[str, str]], **special: str) -> PreTrainedTokenizerFast:
    pairs = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<eos>"))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>", unk_token="<eos>", **special)


@pytest.fixture
def old() -> PreTrainedTokenizerFast:
    return _tokenizer(OLD, [("a", "b")])


@pytest.fixture
def new() -> PreTrainedTokenizerFast:
    return _tokenizer(NEW, [("a", "b"), ("ab", "c"), ("b", "b"), ("c", "ab")], pad_token="<pad>")


def _model(tied: bool, rows: int = len(OLD)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("moh", [False, True], ids=["dense", "moh"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_are_kept_or_the_mean_of_the_pieces(old, new, tied: bool, moh: bool) -> None:
    model = _model(tied, rows=8)  # two rows of padding
    if moh:
        model = convert(model, shared_heads=1, active_heads=2, router="query_norm")
    before = [
        module.weight.detach().clone() for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    counts = extend_vocabulary(model, old, new)
    assert counts == ExtendedVocabulary(kept=5, averaged=3, unspelled=2)
    after = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (after[0] is after[1]) is tied
    spelled = {"<eos>": "<eos>", "c": "c", "b": "b", "a": "a", "ab": "ab", "abc": "ab c", "bb": "b b", "cab": "c ab"}
    for old_rows, new_rows in zip(before, after, strict=True):
        assert new_rows.shape == (len(NEW), 16)
        for token, parts in spelled.items():
            expected = old_rows[[OLD.index(part) for part in parts.split()]].mean(0)
            torch.testing.assert_close(new_rows[NEW.index(token)], expected)
        for token in ("<pad>", "z"):
            torch.testing.assert_close(new_rows[NEW.index(token)], old_rows[: len(OLD)].mean(0))
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (len(NEW), 1, 0)


@torch.no_grad()
def test_text_of_known_tokens_gives_the_same_logits(old, new) -> None:
    model = _model(tied=False)
    ids = torch.tensor([[OLD.index(token) for token in ("a", "b", "c", "ab")]])
    before = model(ids).logits
    extend_vocabulary(model, old, new)
    after = model(torch.tensor([[NEW.index(token) for token in ("a", "b", "c", "ab")]])).logits
    both = [token for token in NEW if token in OLD]
    torch.testing.assert_close(after[..., [NEW.index(t) for t in both]], before[..., [OLD.index(t) for t in both]])


def _of_bytes(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level, as SmolLM2's and GPT-2's: a space is "Ġ", "é" the byte 0xE9 and the letter é "Ã©"."""
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    pairs = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>")


def _of_pieces(tokens: list[str]) -> PreTrainedTokenizerBase:
    """As Llama's: a space is "▁", which is also put before a text and left out at its beginning."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", *tokens])}
    return LlamaTokenizer(vocab=vocabulary, merges=[])


def test_a_token_with_a_leading_space_begins_as_the_one_with_the_space() -> None:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "t"), ("Ġ", "Ġ"), ("Ã", "©")]
    old = _of_bytes(merges)
    new = _of_pieces(["▁", "t", "he", "the", "▁the", "▁t", "▁▁", "é", "▁é", "."])
    model, old_ids, new_ids = _model(tied=True, rows=len(old)), old.get_vocab(), new.get_vocab()
    before = model.get_input_embeddings().weight.detach().clone()
    extend_vocabulary(model, old, new)
    after = model.get_input_embeddings().weight
    spelled = {
        "▁": "Ġ", "t": "t", "the": "the", "▁the": "Ġthe", "▁t": "Ġt", "▁▁": "ĠĠ", "é": "Ã©", "▁é": "Ġ Ã©", "he": "h e",
        ".": ".", "<0x0A>": "Ċ",
    }  # fmt: skip
    for token, parts in spelled.items():
        expected = before[[old_ids[part] for part in parts.split()]].mean(0)
        torch.testing.assert_close(after[new_ids[token]], expected, msg=f"{token} is not {parts}")


def test_a_token_within_a_word_begins_without_the_space_that_the_old_tokenizer_puts_before_a_text() -> None:
    old, new = _of_pieces(["▁", "▁the", "the", "."]), _of_bytes([("t", "h"), ("th", "e"), ("Ġ", "t")])
    model, old_ids, new_ids = _model(tied=True, rows=len(old)), old.get_vocab(), new.get_vocab()
    before = model.get_input_embeddings().weight.detach().clone()
    extend_vocabulary(model, old, new)
    after = model.get_input_embeddings().weight
    for token, piece in (("the", "the"), ("Ġ", "▁"), (".", ".")):
        torch.testing.assert_close(after[new_ids[token]], before[old_ids[piece]], msg=f"{token} is not {piece}")


def test_rows_are_rounded_up(old, new) -> None:
    model = _model(tied=True)
    extend_vocabulary(model, old, new, multiple_of=8)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 16


def test_the_command_leaves_a_model_that_trains_with_its_tokenizer(old, new, tmp_path: Path, capsys) -> None:
    _model(tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    old.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    command = ["extend-vocabulary", str(tmp_path / "model"), str(tmp_path / "tokenizer"), str(tmp_path / "out")]
    with pytest.warns(
        UserWarning, match="generation_config: transformers refuses to save temperature = 0.9, top_p = 0.6"
    ):
        assert main(command) == 0
    assert "5 tokens kept, 3 new ones are the mean of their pieces, 2 the mean of all" in capsys.readouterr().out
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert model.dtype is torch.bfloat16 and len(tokenizer) == model.config.vocab_size == len(NEW)
    assert tokenizer("abc cab")["input_ids"] == [6, 8]


@pytest.mark.parametrize("moh", [False, True], ids=["dense", "moh"])
def test_another_process_replaces_the_output_unless_something_was_added(
    old, new, moh: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    model = _model(tied=True)
    if moh:
        model = convert(model, shared_heads=1, active_heads=2, router="query_norm")
    model.save_pretrained(tmp_path / "model")
    old.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "tokenizer")
    command = ["extend-vocabulary", str(tmp_path / "model"), str(tmp_path / "tokenizer"), str(tmp_path / "out")]
    for _ in range(2):
        monkeypatch.setattr("moh._files._written", set())  # as in a process that wrote nothing yet
        assert main(command) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(command) == 2
    assert "such as notes.txt" in capsys.readouterr().err


def test_what_does_not_fit_is_said(old, new, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="the tokenizer of the model has 6 tokens, but the model a vocabulary of 4"):
        extend_vocabulary(_model(tied=True, rows=4), old, new)
    with pytest.raises(ValueError, match="multiple_of must be at least 1, got 0"):
        extend_vocabulary(_model(tied=True), old, new, multiple_of=0)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["extend-vocabulary", "nowhere/at/all", "nowhere", str(tmp_path)]) == 2
    assert "holds other files, which are kept" in capsys.readouterr().err
