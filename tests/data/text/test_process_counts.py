"""No sequence is skipped or read twice, whatever the number of processes, also if it changes.

No processes are started: accelerate's shards are read side by side, as its data loaders do in each process.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from moh.data.text.order import StoredMixture
from moh.data.text.readers import SourceRecipe
from moh.data.text.sources import open_source
from moh.data.text.store import StoredBlocks, open_store
from moh.data.text.streaming import STREAM_KEY, StreamedMixture
from moh.data.text.tokenising import DocumentTokenizer

STEP, WEIGHTS, SEED = 24, [3, 1], 5

PARTS = st.lists(
    st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3, 4, 6, 8])).flatmap(
        lambda part: st.tuples(
            st.just(part[0]), st.just(part[1]), st.sampled_from([n for n in range(1, 25) if STEP // part[1] % n == 0])
        )
    ),
    min_size=1,
    max_size=3,
)
"""Steps, processes and samples of a forward pass of each part of a run; every step reads `STEP` sequences."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sources")
    words = "head token gate router layer value key query sees skips picks weighs".split()
    for name, count in (("a", 40), ("b", 17)):
        lines = [{"text": " ".join(words[(i * j + i) % 12] for j in range(3 + i % 9))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [open_source(SourceRecipe(str(folder / f"{name}.jsonl")), name=name) for name in "ab"]


@pytest.fixture(scope="module")
def documents(base_dir: Path) -> DocumentTokenizer:
    from transformers import AutoTokenizer

    return DocumentTokenizer(AutoTokenizer.from_pretrained(base_dir))


@pytest.fixture(scope="module")
def stream(sources, documents):
    return lambda: StreamedMixture(sources, WEIGHTS, documents, seq_len=7, buffer=5, seed=SEED)


@pytest.fixture(scope="module")
def streamed(stream) -> list[tuple[int, ...]]:
    return [_row(item) for item in islice(stream(), 6 * STEP)]


def _row(item) -> tuple[int, ...]:
    return tuple(item["input_ids"].tolist())


def _in_order(shards: list[list], batch: int) -> list:
    """The processes' sequences in global order: one forward pass of each process in turn."""
    passes = [[shard[i : i + batch] for i in range(0, len(shard), batch)] for shard in shards]
    return [item for turn in zip(*passes, strict=True) for part in turn for item in part]


@settings(max_examples=15)  # every process reads the whole stream
@given(parts=PARTS)
def test_a_stream_is_read_once_by_any_numbers_of_processes(stream, streamed, parts) -> None:
    read, state = [], None
    for steps, processes, batch in parts:
        shards = []
        for rank in range(processes):
            dataset = stream()
            if state is not None:
                dataset.resume(state, len(read))
            shard = IterableDatasetShard(dataset, batch, num_processes=processes, process_index=rank)
            shards.append(list(islice(shard, steps * STEP // processes)))
        state = shards[-1][-1][STREAM_KEY].tolist()  # the state after the step's last sequence
        read += [_row(item) for item in _in_order(shards, batch)]
    assert read == streamed[: len(read)]


@settings(max_examples=30)
@given(parts=PARTS)
def test_a_stream_that_the_first_process_reads_for_all_is_read_once(stream, streamed, parts) -> None:
    """The Trainer's way: accelerate splits what the first process reads into one part per process."""
    read, state = 0, None
    for steps, processes, batch in parts:
        dataset = stream()
        if state is not None:
            dataset.resume(state, read)
        items = list(islice(dataset, steps * STEP))
        # the first process keeps the state of its own last sequence, which comes before the step's last
        state = items[-1 - (processes - 1) * batch][STREAM_KEY].tolist()
        assert [_row(item) for item in items] == streamed[read : read + len(items)]
        read += len(items)


@given(parts=PARTS)
def test_stored_sequences_are_read_once_by_any_numbers_of_processes(parts) -> None:
    total = sum(steps for steps, _, _ in parts) * STEP
    read: list[int] = []
    for steps, processes, batch in parts:
        order = BatchSampler(SequentialSampler(range(total)), batch, drop_last=True)
        shards = []
        for rank in range(processes):
            sampler = SkipBatchSampler(BatchSamplerShard(order, processes, rank), len(read) // batch // processes)
            shards.append([index for part in islice(sampler, steps * STEP // processes // batch) for index in part])
        read += _in_order(shards, batch)
    assert read == list(range(total))


def test_every_block_of_a_store_is_met_once_an_epoch(sources, documents, tmp_path: Path) -> None:
    blocks = StoredBlocks(open_store(sources[0], documents, tmp_path), 7)
    mixture = StoredMixture([blocks], [1], seed=SEED, length=2 * len(blocks))
    rows = [_row(mixture[index]) for index in range(2 * len(blocks))]
    whole = sorted(_row(blocks[index]) for index in range(len(blocks)))
    assert sorted(rows[: len(blocks)]) == sorted(rows[len(blocks) :]) == whole
    assert rows[: len(blocks)] != rows[len(blocks) :]
