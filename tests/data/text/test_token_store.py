"""A source is tokenised once, kept, and tokenised again when it or the tokenizer changes."""

from __future__ import annotations

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moh.data.text import store as store_module
from moh.data.text.blocks import IGNORED
from moh.data.text.order import StoredMixture
from moh.data.text.readers import SourceRecipe
from moh.data.text.sources import Source, open_source
from moh.data.text.store import StoredBlocks, open_store
from moh.data.text.tokenising import DocumentTokenizer

TEXTS = ["the head reads .", "a token", "the value of the router", "or"]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return open_source(SourceRecipe(str(file)), name="x")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were tokenised."""
    names: list[str] = []
    write = store_module._write
    monkeypatch.setattr(store_module, "_write", lambda source, *rest: names.append(source.name) or write(source, *rest))
    return names


def test_a_store_holds_the_documents_ids_in_a_row_and_where_each_begins(source, tokenizer, tmp_path: Path) -> None:
    store = open_store(source, DocumentTokenizer(tokenizer), tmp_path)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    assert store.tokens.tolist() == [i for row in rows for i in row]
    assert store.offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert (store.documents, store.tokens.dtype) == (4, np.uint16)
    assert isinstance(store.tokens, np.memmap) and isinstance(store.offsets, np.memmap)
    assert pickle.loads(pickle.dumps(store)).tokens.tolist() == store.tokens.tolist()
    assert len(pickle.dumps(store)) < 1000  # mapped again, not copied


def test_a_start_token_is_added_where_the_tokenizer_adds_one(source, tokenizer, bos_tokenizer, tmp_path: Path) -> None:
    documents = DocumentTokenizer(bos_tokenizer)
    store = open_store(source, documents, tmp_path)
    assert [int(store.tokens[i]) for i in store.offsets[:-1]] == [bos_tokenizer.bos_token_id] * 4
    assert documents.identity != DocumentTokenizer(tokenizer).identity


def test_every_block_begins_with_the_start_token(source, bos_tokenizer, tmp_path: Path) -> None:
    store, bos = open_store(source, DocumentTokenizer(bos_tokenizer), tmp_path), bos_tokenizer.bos_token_id
    blocks = StoredBlocks(store, 6)  # 20 tokens in documents of 6, 4, 7 and 3
    assert len(blocks) == 4
    rows = [block["input_ids"].tolist() for block in blocks]
    assert [row[0] for row in rows] == [bos] * 4
    assert [i for row in rows for i in row[1:]] == store.tokens.tolist()
    # before a whole document it is alone, before the rest of one it is its beginning
    assert blocks[0]["position_ids"].tolist() == [0, 0, 1, 2, 3, 4]
    assert blocks[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3]
    assert (blocks[1]["labels"] == IGNORED).tolist() == [True, True, True, False, False, False]


def test_ids_above_16_bits_get_32(tokenizer, tmp_path: Path, source) -> None:
    tokenizer.add_tokens([f"new{i}" for i in range(70_000)])
    (tmp_path / "a.jsonl").write_text('{"text": "new69999"}')
    store = open_store(source, DocumentTokenizer(tokenizer), tmp_path)
    assert store.tokens.dtype == np.uint32 and store.tokens[0] > 1 << 16


def test_a_store_is_made_once_and_again_when_the_source_changes(
    source, tokenizer, tmp_path: Path, written: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    documents = DocumentTokenizer(tokenizer)
    first = open_store(source, documents, tmp_path)
    assert open_store(source, documents, tmp_path).digest == first.digest
    assert len(written) == 1
    tokenizer(["a"], truncation=True, max_length=1)  # changes the tokenizer's state, but not its output here
    assert DocumentTokenizer(tokenizer).identity == documents.identity

    (tmp_path / "a.jsonl").write_text('{"text": "a head"}')
    with caplog.at_level(logging.WARNING):
        changed = open_store(source, documents, tmp_path)
    assert "a.jsonl has changed: it is tokenised again" in caplog.text
    assert changed.digest != first.digest and changed.directory == first.directory
    assert changed.documents == 1
    assert [path.name for path in first.directory.iterdir() if path.name.startswith(".")] == []


def test_another_tokenizer_or_field_has_a_store_of_its_own(source, tokenizer, tmp_path: Path, written) -> None:
    first = open_store(source, DocumentTokenizer(tokenizer), tmp_path)
    tokenizer.eos_token = "."
    assert open_store(source, DocumentTokenizer(tokenizer), tmp_path).directory != first.directory
    (tmp_path / "b.jsonl").write_text('{"text": "a head", "title": "the head"}')
    stores = [
        open_store(open_source(SourceRecipe(str(tmp_path / "b.jsonl"), text_field=field), name="x"),
                   DocumentTokenizer(tokenizer), tmp_path)
        for field in ("text", "title")
    ]  # fmt: skip
    assert stores[0].tokens.tolist() != stores[1].tokens.tolist()
    assert len(written) == 4


def test_several_that_need_a_store_at_once_make_it_once(source, tokenizer, tmp_path: Path, written) -> None:
    documents = DocumentTokenizer(tokenizer)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_store(source, documents, tmp_path), range(4)))
    assert len({store.digest for store in stores}) == 1
    assert len(written) == 1


def test_a_store_that_was_not_finished_is_not_taken_for_one(source, tokenizer, tmp_path: Path, monkeypatch) -> None:
    documents = DocumentTokenizer(tokenizer)
    tokenise = documents.tokenise

    def interrupted(texts):
        yield next(iter(tokenise(texts)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(documents, "tokenise", interrupted)
        open_store(source, documents, tmp_path)
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert open_store(source, documents, tmp_path).documents == 4


def test_blocks_cover_the_row_and_drop_what_is_left(source, tokenizer, tmp_path: Path) -> None:
    store = open_store(source, DocumentTokenizer(tokenizer), tmp_path)
    blocks = StoredBlocks(store, 6)
    assert len(blocks) == len(store.tokens) // 6 == 2
    assert [i for block in blocks for i in block["input_ids"].tolist()] == store.tokens[:12].tolist()
    with pytest.raises(ValueError, match=r"a\.jsonl holds 16 tokens, too few for one sequence of data\.seq_len = 17"):
        StoredBlocks(store, 17)


def test_an_empty_source_is_an_error(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl holds no text"):
        open_store(
            open_source(SourceRecipe(str(tmp_path / "a.jsonl")), name="x"), DocumentTokenizer(tokenizer), tmp_path
        )


def test_a_mixture_reads_every_block_of_every_source_by_its_weight(tokenizer, tmp_path: Path) -> None:
    def blocks(name: str, word: str, count: int) -> StoredBlocks:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{word} " * 3}) + "\n" for _ in range(count)))
        return StoredBlocks(
            open_store(open_source(SourceRecipe(str(file)), name="x"), DocumentTokenizer(tokenizer), tmp_path), 4
        )

    mixture = StoredMixture([blocks("a", "head", 6), blocks("b", "token", 2)], [3, 1], seed=0, length=16)
    head, token = tokenizer("head token")["input_ids"]
    read = [mixture[index]["input_ids"][0].item() for index in range(len(mixture))]
    assert read.count(head) == 12 and read.count(token) == 4  # two epochs of each
    with pytest.raises(IndexError):
        mixture[16]
