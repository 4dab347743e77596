"""Promises of the comparison of engines: what a worker measures of a model, and what the table says of samples."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import engine_worker, engines
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts back what a worker sets in its own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture
def dense(tmp_path: Path) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    return model


@pytest.mark.parametrize("options", [{"float32"}, {"bfloat16"}], ids=["float32", "bfloat16"])
def test_a_worker_reads_a_text_and_continues_it(settings: None, dense: Any, tmp_path: Path, options: set[str]) -> None:
    engine = engine_worker.Torch(str(tmp_path / "dense"), 1, options)
    text = [i % 64 for i in range(12)]
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss
    assert math.isclose(engine.nats(text), float(expected), rel_tol=1e-4 if options == {"float32"} else 1e-2)
    for _ in range(2):  # each time into an empty cache
        engine.read(text[:8])
        engine.next(text[8:9])
        engine.next(text[9:10])
        assert engine.cache.get_seq_length() == engine.position == 10
    size = 4 if options == {"float32"} else 2
    cache = 2 * 2 * 2 * 8 * engine_worker.LENGTH
    assert engine.bytes() == size * (sum(p.numel() for p in dense.parameters()) + cache)


def test_the_table_has_medians_and_the_limit_where_the_bytes_are_known() -> None:
    row = dict(nats=[1.0, 3.0], prefill=[0.5, 1.0, 2.0], decode=[0.01, 0.02, 0.04])
    found = dict(
        cpu="a CPU", clock="wall", threads=2, corpus="prose", tokens=1024, bytes_per_second=[1e9, 2e9, 3e9],
        rows={"known": row | dict(bytes=10**7), "unknown": row | dict(bytes=None)},
    )  # fmt: skip
    lines = engines.table(found).splitlines()
    known, unknown = (next(line for line in lines if line.startswith(f"| {name}")) for name in ("known", "unknown"))
    assert known == "| known | 512 (384–768) | 50.0 (37.5–75.0) | 4.00 | 7.39 |"
    assert unknown.split(" | ")[3] == "–"
    assert "3 rounds" in lines[-1] and "2.0 GB per s" in lines[-1]


def test_engines_without_a_python_are_left_out() -> None:
    given = dict(dense="D", gguf=None, moh=[], llama_python=None, int8_python=None, without=["bfloat16"])
    assert [name for name, *_ in engines.contenders(argparse.Namespace(**given))] == [
        "transformers, float32",
        "transformers, float32, compiled, static cache",
    ]
    given |= dict(llama_python="python", gguf="D.gguf")
    names = [name for name, *_ in engines.contenders(argparse.Namespace(**given))]
    assert names[-3:] == ["llama.cpp, F16", "llama.cpp, BF16", "llama.cpp, Q8_0"]


def test_int8_is_measured_dense_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_share", {"A": "78% of the heads", "B": "56% of the heads"}.get)
    given = dict(
        dense="D", gguf=None, moh=["A", "B"], llama_python=None, int8_python="python", without=["float32", "16"]
    )
    assert [(name, model) for name, *_, model in engines.contenders(argparse.Namespace(**given))] == [
        ("transformers, int8", "D"),
        ("ours, 78% of the heads, int8", "A"),
        ("ours, 56% of the heads, int8", "B"),
    ]


def test_two_models_of_one_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_share", lambda model: "78% of the heads")
    given = dict(dense="D", gguf=None, moh=["A", "B"], llama_python=None, int8_python=None, without=[])
    with pytest.raises(ValueError, match="--moh must be models of different shares of heads"):
        engines.contenders(argparse.Namespace(**given))


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("--rounds must be at least 2, for quartiles, got 1", ["--rounds", "1"]),
        ("--out .* can't be written", ["--out", "/dev/null/results/engines.json"]),
        ("--blocks must give at least 528 tokens, but 1 have 512", ["--blocks", "1"]),
    ],
    ids=["rounds", "out", "blocks"],
)
def test_what_would_end_in_an_error_later_is_refused_at_once(
    message: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moh.models.transformers.loading.load_tokenizer", lambda model: None)
    monkeypatch.setattr("moh.training.load_corpus", lambda name: SimpleNamespace(heldout=""))
    monkeypatch.setattr("moh.training.pack_tokens", lambda *given, seq_len: torch.zeros(4, seq_len, dtype=torch.long))
    monkeypatch.setattr(engines, "Worker", None)
    threads = ["--threads", str(torch.get_num_threads())]  # they are set in this process
    with pytest.raises(SystemExit):
        engines.main(["--dense", "D", "--corpus", "django-docs", *threads, *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_what_w_o_is_for_other_shares_is_not_counted(settings: None, tmp_path: Path) -> None:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    found, saved = [], []
    for several in (None, {"heads": [2, 3], "rank": 2, "used_heads": [2, 2]}):
        config = MoHLlamaConfig(**sizes, router="linear", shared_heads=1, active_heads=1, output_changes=several)
        model = MoHLlamaForCausalLM(config)
        model.save_pretrained(tmp_path)
        saved.append(sum(weight.numel() for weight in model.state_dict().values()))
        found.append(engine_worker.Torch(str(tmp_path), 1, {"moh", "float32"}).bytes())
    assert saved[0] < saved[1]
    assert found[0] == found[1]


def test_a_worker_that_ends_is_an_error(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[]")
    worker = engines.Worker("name", "no-such-engine", engines.sys.executable, "model", 1, tokens)
    with pytest.raises(RuntimeError, match="name ended with exit code 1"):
        worker.answer()
