"""Promises of exported models: transformers' exporters take a model whose tokens use equally many heads per group.

The exported program is the one that saves: gathered queries and PyTorch's own attention, of static shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the hf extra is not installed")

import moh.models.transformers

exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
GROUPED = dict(routing_unit="group_balanced", num_attention_heads=6, num_key_value_heads=2, shared_heads=2)
TINY = dict(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, head_dim=8, active_heads=2)


def tiny_model(router: str = "linear", **options: Any) -> Any:
    torch.manual_seed(0)
    config = moh.models.transformers.MoHLlamaConfig(**TINY | GROUPED | dict(router=router) | options)
    model = moh.models.transformers.MoHLlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model


def ids(batch: int, tokens: int) -> dict[str, Tensor]:
    chosen = torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(chosen)
    mask[0, :2] = 0  # padded on the left
    return dict(input_ids=chosen, attention_mask=mask)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Any]:
    def export(model: Any, kind: str, **options: Any) -> Any:
        exporter, config = getattr(exporters, f"{kind}Exporter"), getattr(exporters, f"{kind}Config")
        made = exporter().export(model, ids(2, 12) | dict(use_cache=False), config(**options))
        made.save_pretrained(tmp_path)
        return exporters.ExportedModel.from_pretrained(tmp_path)

    return export


@torch.no_grad()
def assert_equal(model: Any, program: Any, *sizes: tuple[int, int]) -> None:
    model.set_attn_implementation("moh_reference")
    for size in sizes:
        inputs = ids(*size)
        seen = inputs["attention_mask"].bool()
        expected, got = model(**inputs, use_cache=False).logits[seen], program(**inputs).logits[seen]
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("router", "unit", "implementation"),
    [
        ("linear", "group_balanced", "moh_grouped"),
        ("two_stage", "group_balanced", "moh_grouped"),
        ("query_norm", "group_balanced", "moh_grouped"),
        ("linear", "head", "sdpa"),
        ("query_norm", "head", "sdpa"),
    ],
)
def test_a_program_of_torch_export_gives_the_same(exported: Any, router: str, unit: str, implementation: str) -> None:
    model = tiny_model(router, routing_unit=unit)
    model.set_attn_implementation(implementation)
    program = exported(model, "Dynamo")
    assert_equal(model, program, (2, 12))


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_for_other_lengths_too(exported: Any) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(
            module, reason="the packages of ONNX are not installed: pip install onnx onnxscript onnxruntime"
        )
    model = tiny_model()
    model.set_attn_implementation("moh_grouped")
    program = exported(model, "Onnx", dynamic=True)
    kinds = [node.op_type for node in program.program.graph]
    assert "NonZero" not in kinds and kinds.count("GatherElements") >= 2 * 2  # static shapes, active queries alone
    assert_equal(model, program, (2, 12), (3, 7), (1, 30))
