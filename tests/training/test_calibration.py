"""What a recipe's conversion is calibrated on: running text in blocks of the lengths that `moh convert` takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import moh.conversion
from moh.conversion.transformers import adapter
from moh.data.text.blocks import calibration_blocks
from moh.training import load_recipe, train
from moh.training.language.data import prepare_text

CONVERSION = ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--training.max_steps=1"]
WORDS = "head token gate router layer value key query".split()
KINDS = ["corpus", "stored", "streamed"]
Passages = Callable[..., list[list[int]]]


@pytest.fixture
def passages(tmp_path: Path) -> Passages:
    """Reads texts as a corpus or as sources with weights, and takes passages of them to calibrate on."""

    def take(
        tokenizer: Any, kind: str, texts: Sequence[str], tokens: int, length: int, *, weights: Sequence[float] = (1,),
        start: Sequence[int] = (),
    ) -> list[list[int]]:  # fmt: skip
        files = [tmp_path / f"{index}.txt" for index in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        heldout = tmp_path / "heldout.txt"
        heldout.write_text(" ".join(WORDS))
        sources = [{"path": str(file), "weight": weight} for file, weight in zip(files, weights, strict=True)]
        text = [f"--data.sources={json.dumps(sources)}", f"--data.streaming={kind == 'streamed'}"]
        if kind == "corpus":
            text = [f"--data.files={json.dumps([str(files[0])])}", f"--data.heldout_files={json.dumps([str(heldout)])}"]
        options = [*text, f"--data.cache_dir={tmp_path}", "--data.seq_len=2", "--model.path=x"]
        recipe = load_recipe(None, [*options, "--training.output_dir=x", "--training.max_steps=1"])
        arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=1, use_cpu=True)
        found = prepare_text(recipe, tokenizer, arguments).calibration(tokens, length, start)
        assert isinstance(found, list)
        return found

    return take


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("words", "weights", "tokens", "length", "parts"),
    [
        ([400, 80], [3, 1], 192, 48, [144, 48]),
        ([2000, 110], [1, 1], 200, 50, [100, 100]),  # the second holds its part, but no more
        ([70, 70, 70], [1, 1, 1], 128, 32, [43, 43, 43]),
        ([990, 400], [9, 1], 200, 50, [180, 20]),  # less than a passage
        ([400, 9], [1, 1], 96, 48, [48, 10]),  # all that it holds, the end of the text included
    ],
    ids=["3-to-1", "exactly-enough", "rounded-up", "9-to-1", "too-short"],
)
def test_sources_give_their_parts_by_weight(tokenizer, passages, kind, words, weights, tokens, length, parts) -> None:
    texts = [" ".join([word] * count) for word, count in zip(WORDS, words, strict=False)]
    found = passages(tokenizer, kind, texts, tokens, length, weights=weights)
    own = tokenizer.convert_tokens_to_ids(WORDS[: len(words)])
    given = [sum(len(p) for p in found if p[0] == word) for word in own]
    assert given == parts
    (blocks,) = calibration_blocks(found, tokenizer, tokens, [length], len(tokenizer))
    assert len(blocks) == min(tokens, sum(parts)) // length
    for blocks in calibration_blocks(found, tokenizer, tokens, [4, 8], len(tokenizer)):
        shares = torch.stack([(blocks == word).sum() for word in own]) / blocks.numel()
        assert torch.allclose(shares, torch.tensor(parts) / sum(parts), atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", [False, True], ids=["plain", "bos"])
def test_passages_are_running_text_of_all_places(tokenizer, bos_tokenizer, text_file, passages, kind, begins) -> None:
    """Full blocks of the longest length are passages as they are, also where each begins with a token of its own."""
    chosen = bos_tokenizer if begins else tokenizer
    start = [chosen.bos_token_id] if begins else []
    found = passages(chosen, kind, [text_file.read_text()], 200, 48, start=start)
    full, last = found[:-1], found[-1]
    assert {len(p) for p in full} == {48} and len(full) == 200 // (48 - len(start))
    assert all(p[: len(start)] == start for p in found) and sum(len(p) - len(start) for p in found) == 200
    row = [*tokenizer(text_file.read_text(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    row = [*start, *row] if kind != "corpus" else row  # a document begins so too
    bare = [p[len(start) :] for p in found]
    places = [next(i for i in range(len(row)) if row[i : i + len(p)] == p) for p in bare]
    if kind == "streamed":
        assert places == list(range(0, 200, 48 - len(start)))
    else:
        gaps = [b - a for a, b in pairwise(places)]
        assert places[0] == 0 and places[-1] + len(bare[-1]) >= len(row) - 1 and max(gaps) - min(gaps) <= 1
    (blocks,) = calibration_blocks(found, chosen, 48 * len(full), [48], len(chosen))
    assert blocks.tolist() == full
    assert len(last) < 48


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("length", [16, 100, 1000])
def test_a_text_that_is_shorter_than_requested_is_read_whole(
    tokenizer, bos_tokenizer, passages, kind, begins, length
) -> None:
    chosen = bos_tokenizer if begins else tokenizer
    start = [chosen.bos_token_id] if begins else []
    text = " ".join(WORDS * 20)
    found = passages(chosen, kind, [text], 1000, length, start=start)
    inside = [] if kind == "corpus" else start  # what the document itself begins with
    expected = [*inside, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    row = [i for p in found for i in p[len(start) :]]
    assert row == expected[: len(row)] and len(expected) - len(row) <= 1  # a corpus is read in blocks of data.seq_len
    (blocks,) = calibration_blocks(found, chosen, 1000, [8], len(chosen))
    assert len(blocks) == len(row) // (8 - len(start))


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> Callable[..., dict[str, Any]]:
    """Runs a recipe up to its conversion: the arguments of `convert`."""

    class Called(Exception):
        pass

    def record(dense: Any, **arguments: Any) -> None:
        raise Called(arguments)

    def run(more: Sequence[str] = (), **objects: Any) -> dict[str, Any]:
        monkeypatch.setattr(moh.conversion, "convert", record)
        with pytest.raises(Called) as called:
            train(load_recipe(None, [*options, *CONVERSION, *more]), **objects)
        return called.value.args[0]

    return run


def read_by(dense: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The blocks that `convert` makes of these arguments."""
    return adapter(dense, "linear", copied=False).samples(
        arguments["calibration"], max_tokens=arguments["calibration_tokens"], tokenizer=arguments["tokenizer"],
        seq_len=arguments["seq_len"],
    )  # fmt: skip


def test_by_default_a_recipe_calibrates_as_moh_convert_does(converted, base_dir, tmp_path, text_file) -> None:
    config = AutoConfig.from_pretrained(base_dir, max_position_embeddings=4096)
    dense = AutoModelForCausalLM.from_pretrained(base_dir, config=config)
    dense.save_pretrained(tmp_path / "longer")
    for file in base_dir.glob("*token*"):
        (tmp_path / "longer" / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([text_file.read_text()] * 30))
    arguments = converted([f"--model.path={tmp_path / 'longer'}", f"--data.files=['{text}']"])
    assert sum(map(len, arguments["calibration"])) == 49_152 == arguments["calibration_tokens"]
    assert [tuple(blocks.shape) for blocks in read_by(dense, arguments)] == [(48, 512), (6, 4096)]


@pytest.mark.parametrize(
    ("options_of", "shapes"),
    [
        (["--conversion.calibration_tokens=640"], [(10, 64)]),  # the model's positions, not 512
        (["--conversion.calibration_tokens=192", "--conversion.calibration_length=[8, 48]"], [(12, 8), (2, 48)]),
    ],
    ids=["default", "lengths"],
)
def test_blocks_are_of_lengths_that_the_model_reads(converted, dense, options_of, shapes) -> None:
    assert [tuple(blocks.shape) for blocks in read_by(dense, converted(options_of))] == shapes


def test_blocks_of_the_caller_are_read_as_they_are(converted, dense) -> None:
    rows = torch.randint(len(WORDS), (20, 16))  # in no order
    arguments = converted(["--conversion.calibration_tokens=64"], train_blocks=rows)
    (blocks,) = read_by(dense, arguments)
    assert blocks.tolist() == rows[[0, 6, 12, 19]].tolist()


@pytest.mark.parametrize("calibration", [[], ["--conversion.calibration=[x.txt]"]], ids=["own", "named"])
def test_a_length_beyond_the_models_positions_is_refused(options, calibration) -> None:
    message = "conversion.calibration_length must be at most the model's max_position_embeddings = 64, got 65"
    with pytest.raises(ValueError, match=message):
        train(load_recipe(None, [*options, *CONVERSION, *calibration, "--conversion.calibration_length=[8, 65]"]))
