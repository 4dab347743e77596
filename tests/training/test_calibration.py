"""What a recipe's conversion is calibrated on: running text in blocks of the lengths that `moh convert` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import moh.conversion
from moh.data.text.blocks import calibration_blocks, pack_tokens
from moh.training import load_recipe, train

CONVERSION = ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--training.max_steps=1"]
WORDS = "head token gate router layer value key query".split()


@pytest.fixture(params=["corpus", "stored", "streamed"])
def kind(request: pytest.FixtureRequest, options: list[str], text_file: Path, tmp_path: Path) -> str:
    """Makes `options` read from one file, or from two sources of which one is shorter than a long block."""
    if request.param != "corpus":
        (tmp_path / "short.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 2)}) + "\n")
        options[1] = f"--data.sources=[{{path: {text_file}, weight: 3}}, {{path: {tmp_path}/short.jsonl}}]"
        options += [f"--data.cache_dir={tmp_path / 'cache'}", f"--data.streaming={request.param == 'streamed'}"]
    return str(request.param)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every conversion."""
    calls: list[dict[str, Any]] = []
    convert = moh.conversion.convert

    def record(dense: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return convert(dense, **arguments)

    monkeypatch.setattr(moh.conversion, "convert", record)
    return calls


def test_blocks_of_every_length_are_running_text(options, kind, converted, tokenizer, text_file) -> None:
    train(load_recipe(None, [*options, *CONVERSION, "--conversion.calibration_tokens=192",
                             "--conversion.calibration_length=[8, 48]"]))  # fmt: skip
    (call,) = converted
    short, long = calibration_blocks(call["calibration"], tokenizer, call["calibration_tokens"], call["seq_len"], 100)
    assert short.shape == (12, 8) and long.shape == (2, 48)  # 96 tokens of each, though data.seq_len is 16
    row = pack_tokens([text_file.read_text()], tokenizer, seq_len=2).flatten().tolist()
    passages = {tuple(row[i : i + 48]) for i in range(len(row))}
    assert tuple(long[0].tolist()) in passages
    if kind == "corpus":
        assert len({len(p) for p in call["calibration"]}) == 1 and len(call["calibration"]) == 24  # many places


def test_by_default_a_recipe_calibrates_as_moh_convert_does(options, converted, base_dir, tmp_path, text_file) -> None:
    config = AutoConfig.from_pretrained(base_dir, max_position_embeddings=4096)
    dense = AutoModelForCausalLM.from_pretrained(base_dir, config=config)
    dense.save_pretrained(tmp_path / "longer")
    for file in base_dir.glob("*token*"):
        (tmp_path / "longer" / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([text_file.read_text()] * 20))
    options = [*options, *CONVERSION, f"--model.path={tmp_path / 'longer'}", f"--data.files=['{text}']"]
    train(load_recipe(None, options))
    (call,) = converted
    adapter = moh.conversion.transformers.adapter(dense, "linear", copied=False)
    samples = adapter.samples(
        call["calibration"], max_tokens=call["calibration_tokens"], tokenizer=call["tokenizer"], seq_len=call["seq_len"]
    )
    assert [tuple(blocks.shape) for blocks in samples] == [(48, 512), (6, 4096)]
