"""A stream gives the same blocks as a store, in bounded memory, and resumes exactly at any sequence."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from moh.data.text.readers import SourceRecipe
from moh.data.text.sources import open_source
from moh.data.text.store import StoredBlocks, open_store
from moh.data.text.streaming import STREAM_KEY, StreamedMixture
from moh.data.text.tokenising import DocumentTokenizer

SEQ_LEN = 5


def _write(file: Path, word: str, count: int) -> SourceRecipe:
    words = "head token gate router layer value key query".split()
    lines = [{"text": f"{word} " + " ".join(words[(i * j) % 8] for j in range(i % 9))} for i in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceRecipe(str(file))


@pytest.fixture
def sources(tmp_path: Path):
    recipes = _write(tmp_path / "a.jsonl", "the", 30), _write(tmp_path / "b.jsonl", "a", 11)
    return [open_source(recipe, name="x") for recipe in recipes]


def _stream(sources, tokenizer, *, buffer: int = 4, seed: int = 0) -> StreamedMixture:
    documents = DocumentTokenizer(tokenizer)
    return StreamedMixture(sources, [3, 1][: len(sources)], documents, seq_len=SEQ_LEN, buffer=buffer, seed=seed)


def _rows(items) -> list[tuple[int, ...]]:
    return [
        tuple(item["input_ids"].tolist() + item["position_ids"].tolist() + item["labels"].tolist()) for item in items
    ]


@pytest.mark.parametrize("buffer", [1, 4, 1000], ids=lambda buffer: f"buffer_{buffer}")
def test_one_pass_over_a_source_gives_the_blocks_of_its_store(sources, tokenizer, tmp_path: Path, buffer: int) -> None:
    stored = StoredBlocks(open_store(sources[0], DocumentTokenizer(tokenizer), tmp_path), SEQ_LEN)
    expected = _rows(stored[index] for index in range(len(stored)))
    streamed = _rows(islice(_stream(sources[:1], tokenizer, buffer=buffer), 2 * len(stored)))
    assert Counter(streamed[: len(stored)]) == Counter(streamed[len(stored) :]) == Counter(expected)
    if buffer > 1:  # shuffled, and the second pass differently from the first
        assert streamed[: len(stored)] != streamed[len(stored) :]
    else:
        assert streamed[: len(stored)] == expected


def test_blocks_begin_with_the_start_token_as_stored_ones_do(sources, bos_tokenizer, tmp_path: Path) -> None:
    stored = StoredBlocks(open_store(sources[0], DocumentTokenizer(bos_tokenizer), tmp_path), SEQ_LEN)
    streamed = list(islice(_stream(sources[:1], bos_tokenizer), len(stored)))
    assert all(item["input_ids"][0] == bos_tokenizer.bos_token_id for item in streamed)
    assert Counter(_rows(streamed)) == Counter(_rows(stored[index] for index in range(len(stored))))


@pytest.mark.parametrize("at", [4, 5, 16, 17, 40, 77])
@pytest.mark.parametrize("behind", [0, 3], ids=["exact", "state_from_before"])
def test_a_stream_goes_on_from_any_sequence(sources, tokenizer, at: int, behind: int) -> None:
    whole = list(islice(_stream(sources, tokenizer), 100))
    resumed = _stream(sources, tokenizer)
    resumed.resume(whole[at - 1 - behind][STREAM_KEY].tolist(), at)
    rest = list(islice(resumed, 100 - at))
    assert _rows(rest) == _rows(whole[at:])
    assert all(torch.equal(a[STREAM_KEY], b[STREAM_KEY]) for a, b in zip(rest, whole[at:], strict=True))


def test_sources_are_mixed_by_their_weights(sources, tokenizer) -> None:
    head = tokenizer("the a")["input_ids"]
    rows = [set(item["input_ids"].tolist()) for item in islice(_stream(sources, tokenizer), 80)]
    assert sum(head[0] in row for row in rows) > 2 * sum(head[1] in row for row in rows) > 0


def test_another_seed_gives_another_order(sources, tokenizer) -> None:
    first, second, again = (_rows(islice(_stream(sources, tokenizer, seed=seed), 20)) for seed in (0, 1, 0))
    assert first == again != second


def test_no_more_is_read_than_the_buffer_and_a_batch_of_documents(sources, tokenizer, monkeypatch) -> None:
    read = []
    part = type(sources[0].parts[0])
    monkeypatch.setattr(
        part, "read", lambda self, place, old=part.read: (read.append(1) or x for x in old(self, place))
    )
    recipe = _write(Path(sources[0].name), "the", 5000)
    next(iter(_stream([open_source(recipe, name="x")], tokenizer, buffer=10)))
    assert len(read) < 200


def test_a_source_too_short_for_one_sequence_is_an_error(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    source = open_source(SourceRecipe(str(tmp_path / "a.jsonl")), name="x")
    with pytest.raises(ValueError, match=r"a\.jsonl holds too little text for a sequence of 5 tokens"):
        next(iter(_stream([source], tokenizer)))


def test_a_state_of_other_sources_or_from_ahead_is_refused(sources, tokenizer) -> None:
    state = next(iter(_stream(sources, tokenizer)))[STREAM_KEY].tolist()
    with pytest.raises(ValueError, match="must be of 1 sources"):
        _stream(sources[:1], tokenizer).resume(state, 1)
    with pytest.raises(ValueError, match="not be ahead"):
        _stream(sources, tokenizer).resume(state, 0)
