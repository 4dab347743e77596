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

from transformers import DynamicCache

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


RUNTIMES = {
    "Dynamo": (),
    "Onnx": ("onnx", "onnxscript", "onnxruntime"),
    "OpenVINO": ("openvino",),
}
"""Name of an exporter -> the packages that it needs, besides PyTorch."""
LOADING = {"OpenVINO": dict(device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"})}  # its default may be bfloat16


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Any]:
    """Exports a model for a runtime and loads it there; with `generates`, for reading a text and for decoding."""

    def made(model: Any, kind: str, generates: bool = False) -> Any:
        for module in RUNTIMES[kind]:
            pytest.importorskip(module, reason=f"{module} is not installed: pip install {module}")
        options = dict(stateful=False) if kind == "OpenVINO" else {}
        config = getattr(exporters, f"{kind}Config")(dynamic=kind != "Dynamo", **options)
        exporter = getattr(exporters, f"{kind}Exporter")()
        if generates:
            program = exporter.export_for_generation(model, ids(2, 12), config)
        else:
            program = exporter.export(model, ids(2, 12) | dict(use_cache=False), config)
        program.save_pretrained(tmp_path)
        return exporters.ExportedModel.from_pretrained(tmp_path, **LOADING.get(kind, {}))

    return made


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def assert_equal(model: Any, program: Any, *sizes: tuple[int, int]) -> None:
    model.set_attn_implementation("moh_reference")
    for size in sizes:
        inputs = ids(*size)
        seen = inputs["attention_mask"].bool()
        assert_close(program(**inputs).logits[seen], model(**inputs, use_cache=False).logits[seen])


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
def test_a_program_of_torch_export_gives_the_same(export: Any, router: str, unit: str, implementation: str) -> None:
    model = tiny_model(router, routing_unit=unit)
    model.set_attn_implementation(implementation)
    assert_equal(model, export(model, "Dynamo"), (2, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "unit"), [("Onnx", "group_balanced"), ("OpenVINO", "group_balanced"), ("OpenVINO", "head")]
)
def test_other_runtimes_give_the_same(export: Any, kind: str, unit: str) -> None:
    model = tiny_model(routing_unit=unit)
    model.set_attn_implementation("moh_grouped" if unit == "group_balanced" else "sdpa")
    program = export(model, kind)
    if kind == "Onnx" and unit == "group_balanced":
        kinds = [node.op_type for node in program.program.graph]
        assert "NonZero" not in kinds and kinds.count("GatherElements") >= 2 * 2  # static shapes, active queries alone
    assert_equal(model, program, (2, 12), (3, 7), (1, 30))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OpenVINO"])
@torch.no_grad()
def test_a_text_is_read_and_tokens_are_decoded_with_the_cache(export: Any, kind: str) -> None:
    model = tiny_model()
    model.set_attn_implementation("moh_grouped")
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    runners = export(model, kind, generates=True).runners
    model.set_attn_implementation("moh_reference")
    inputs = ids(3, 9)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions, use_cache=True)
    cache = DynamicCache(config=model.config)
    got = runners["prefill"](**inputs, position_ids=positions, past_key_values=cache)
    assert_close(got.logits[mask.bool()], expected.logits[mask.bool()])
    for token in (5, 6, 7):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        following = dict(
            input_ids=torch.full_like(mask[:, :1], token),
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
        )
        expected = model(**following, past_key_values=expected.past_key_values)
        got = runners["decode"](**following, past_key_values=got.past_key_values)
        assert_close(got.logits, expected.logits)
