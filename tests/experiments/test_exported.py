"""Promise: the experiment with exported models compares each variant with PyTorch, resumes, and writes what it measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
if not hasattr(
    pytest.importorskip("transformers.exporters", reason="this transformers has no exporters"), "ExportedModel"
):
    pytest.skip("this transformers can't load what it exports", allow_module_level=True)

import exported  # noqa: E402


def tiny_encoder(layers: int | None) -> tuple[Any, exported.Inputs, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4)  # fmt: skip
    ids = torch.randint(0, 64, (2, 8))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    return transformers.BertModel(config).eval(), inputs, dict(shared_heads=1, active_heads=2)


@pytest.mark.slow
def test_variants_are_exported_measured_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "MODELS", dict(minilm=tiny_encoder))
    options = Namespace(work=tmp_path, runtime="torch", layers=None, rounds=3)
    exported.export(options, "minilm")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt2")}
    assert len(made) == 3
    exported.export(options, "minilm")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt2")} == made
    exported.measure(options, "minilm")
    row = json.loads((tmp_path / "torch-minilm.json").read_text())
    kinds = row["parts"]["model"]
    assert all(kinds[kind]["error"] <= 1e-4 and len(kinds[kind]["seconds"]) == 3 for kind in exported.VARIANTS)
    assert kinds["fixed"]["bytes"] < kinds["dense"]["bytes"] < kinds["routed"]["bytes"]


def test_the_page_has_each_program_next_to_the_dense_one() -> None:
    parts = {
        part: {
            kind: dict(error=2e-6, bytes=3_000_000, seconds=[0.9 * s, s, 1.2 * s])
            for kind, s in dict(dense=0.2, routed=0.1, fixed=0.05).items()
        }
        for part in ("prefill", "decode")
    }
    row = dict(
        runtime="onnx", model="smollm2", layers=30, parts=parts, rounds=9, cpu="a processor", versions=dict(torch="2")
    )
    lines = exported.page([row]).splitlines()
    (line,) = [
        line for line in lines if line.startswith("| ONNX Runtime | SmolLM2-135M, 30 layers, 256 tokens, 6 of 9 heads")
    ]
    assert line.endswith(
        "| 2e-06 | 2e-06 | 2e-06 | 3.0 | 3.0 | 3.0 | 200.0 | 0.50 (0.45 to 0.60) | 0.25 (0.23 to 0.30) |"
    )
    assert sum(line.startswith("| ONNX Runtime |") for line in lines) == 2 and lines[-1].endswith(
        "a processor; torch 2."
    )
