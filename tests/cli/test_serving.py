"""`moh serve`: `transformers serve` finds our models when loading; no network and no server here."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moh.cli import serving
from moh.models.transformers import MoHLlamaForCausalLM
from moh.models.transformers.loading import load_tokenizer

NAME = "MoHLlamaForCausalLM"


@pytest.fixture(autouse=True)
def _transformers_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", AutoConfig.__dict__["from_pretrained"])
    yield
    vars(sys.modules["transformers"]).pop(NAME, None)


def served() -> Any:
    """The class that the server finds under our class's name."""
    return getattr(sys.modules["transformers"], NAME)


def test_the_server_loads_our_model_and_writes_text(moh_dir: Path) -> None:
    pytest.importorskip("uvicorn")
    from transformers.cli.serving.model_manager import ModelManager

    serving.make_servable(str(moh_dir))
    manager = ModelManager(device="cpu", force_model=str(moh_dir))
    model, processor = manager.load_model_and_processor(f"{moh_dir}@main")
    assert type(model) is MoHLlamaForCausalLM
    ids = processor("the head reads", return_tensors="pt").input_ids
    got = model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = MoHLlamaForCausalLM.from_pretrained(moh_dir).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


def test_a_served_model_has_the_requested_share(moh_dir: Path) -> None:
    serving.make_servable(str(moh_dir), 0.75)
    model = served().from_pretrained(moh_dir)
    assert model.config.share == 0.75


@pytest.fixture
def batching(moh_dir: Path) -> Iterator[SimpleNamespace]:
    """A model and the part of `transformers serve` that batches its requests."""
    pytest.importorskip("uvicorn")
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.cli.serving.utils import CBGenerateManager

    serving.make_servable(str(moh_dir), 0.75)
    model, tokenizer = served().from_pretrained(moh_dir), load_tokenizer(moh_dir)
    prompt = tokenizer("the head reads").input_ids
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = model.generate(torch.tensor([prompt]), options)[0, len(prompt) :].tolist()
    manager = CBGenerateManager(ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64))
    manager.init_cb(model, options)
    try:
        yield SimpleNamespace(
            model=model, tokenizer=tokenizer, prompt=prompt, options=options, expected=expected, manager=manager
        )
    finally:
        manager.stop()
    assert model.config._attn_implementation == "moh"


def test_continuous_batching_gives_the_tokens_of_generate(batching: SimpleNamespace) -> None:
    b = batching
    answer = b.manager.generate_non_streaming(b.model, b.tokenizer, {"input_ids": b.prompt}, b.options, "request")
    assert asyncio.run(asyncio.wait_for(answer, 60))[2] == b.expected


async def pieces(b: SimpleNamespace, prompt: list[int]) -> list[Any]:
    """What a client gets piece by piece, up to the end."""
    queue, _ = b.manager.generate_streaming(b.model, b.tokenizer, {"input_ids": prompt}, b.options, "request")
    found = []
    while (piece := await asyncio.wait_for(queue.get(), 60)) is not None:
        found += piece if isinstance(piece, list) else [piece]
    return found


def test_a_batched_request_is_streamed_piece_by_piece(batching: SimpleNamespace) -> None:
    found = asyncio.run(pieces(batching, batching.prompt))
    assert len(found) > 1 and "".join(found) == batching.tokenizer.decode(batching.expected)


def test_a_streamed_request_longer_than_the_cache_ends_with_the_reason(batching: SimpleNamespace) -> None:
    (error,) = asyncio.run(pieces(batching, batching.prompt * 4000))
    assert type(error).__name__ == "_StreamError" and "No requests can be scheduled" in error.msg


def test_the_command_hands_over_with_the_options_of_transformers(
    moh: Any, moh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    seen: list[list[str]] = []
    monkeypatch.setattr("transformers.cli.transformers.app", seen.append)
    assert moh("serve", moh_dir, "--port", "8123", "--device", "cpu").code == 0
    assert seen == [["serve", str(moh_dir), "--port", "8123", "--device", "cpu"]]
    assert served() is MoHLlamaForCausalLM


def test_a_model_without_its_head_is_refused(moh: Any, moh_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = tmp_path / "bare"
    shutil.copytree(moh_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MoHLlamaModel"]}), encoding="utf-8")
    result = moh("serve", folder)
    assert result.code == 2
    assert "must be saved as MoHLlamaForCausalLM, with its head, got MoHLlamaModel" in result.err[-1]
    assert load_tokenizer(folder) is not None
