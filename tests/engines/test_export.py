"""Promises of exported models: each runtime gives PyTorch's numbers, and a program of static shapes keeps the saving.

The runtimes' tests are run by `make test-engines`, some of those of `torch.export` by default, all of them by `make test-all`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
if not hasattr(exporters, "ExportedModel"):
    pytest.skip("this transformers can't load what it exports", allow_module_level=True)

import moh.models.transformers  # noqa: E402
from engines_on_cpu import needs  # noqa: E402
from moh.models.transformers.exported import RUNTIMES, export_model, load_exported  # noqa: E402

GROUPED = dict(routing_unit="group_balanced", num_attention_heads=6, num_key_value_heads=2, shared_heads=2)
TINY = dict(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, active_heads=2)
VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)


def made(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(moh.models.transformers, name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "router" in parameter_name else 0.2)
    return model


def tiny_model(router: str = "linear", **options: Any) -> Any:
    config = moh.models.transformers.MoHLlamaConfig(**TINY | GROUPED | dict(head_dim=8, router=router) | options)
    return made("MoHLlamaForCausalLM", config)


def ids(batch: int, tokens: int, *, left: bool = True) -> dict[str, Tensor]:
    """Random tokens, the first two of the first text padding; with `left=False` the last two."""
    chosen = torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(chosen)
    mask[0, slice(0, 2) if left else slice(-2, None)] = 0
    return dict(input_ids=chosen, attention_mask=mask)


def encoder() -> tuple[Any, dict[str, Tensor]]:
    config = moh.models.transformers.MoHBertConfig(**TINY | dict(num_attention_heads=4, shared_heads=1))
    return made("MoHBertModel", config), ids(2, 12, left=False)


def vit(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    heads = dict(shared_heads=1, active_heads=2, router="two_stage") | options
    config = moh.models.transformers.MoHViTConfig(**VIT, patch_size=8, num_labels=3, **heads)
    return made("MoHViTForImageClassification", config), dict(pixel_values=torch.randn(2, 3, 16, 16))


THRESHOLDS = dict(router="threshold", routing_unit="head", thresholds=[[9.0, 0.5, 0.0, -0.5, -9.0]] * 2)
MODELS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "group_balanced": lambda: (tiny_model(), ids(2, 12)),
    "threshold": lambda: (tiny_model(**THRESHOLDS), ids(2, 12)),
    "fixed": lambda: (tiny_model("fixed", routing_unit="head", active_heads=0, shared_heads=[[0, 1, 3], [4]]), ids(2, 12)),
    "encoder": encoder,
    "vit": vit,
}  # fmt: skip
FOREIGN = [pytest.param(name, marks=pytest.mark.slow) for name in RUNTIMES if name != "torch"]


def outputs(found: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model gives for everything but padding."""
    values: Tensor = found["logits"] if "logits" in found else found["last_hidden_state"]
    return values[inputs["attention_mask"].bool()] if "attention_mask" in inputs else values


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def assert_equal(model: Any, program: Any, *given: dict[str, Tensor]) -> None:
    model.set_attn_implementation("moh_reference")
    for inputs in given:
        assert_close(outputs(program(**inputs), inputs), outputs(model(**inputs), inputs))


@pytest.mark.parametrize(
    ("router", "unit"),
    [
        ("linear", "group_balanced"),
        pytest.param("query_norm", "group_balanced", marks=pytest.mark.slow),
        pytest.param("two_stage", "head", marks=pytest.mark.slow),
        pytest.param("query_norm", "head", marks=pytest.mark.slow),
    ],
)
def test_a_program_of_torch_export_gives_the_same(tmp_path: Path, router: str, unit: str) -> None:
    model, inputs = tiny_model(router, routing_unit=unit), ids(2, 12)
    assert_equal(model, load_exported(export_model(model, inputs, "torch", tmp_path / "out")), inputs)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("threshold", "fixed", "vit")), "encoder"]
)
def test_other_models_are_programs_of_torch_export_too(tmp_path: Path, name: str) -> None:
    model, inputs = MODELS[name]()
    assert_equal(model, load_exported(export_model(model, inputs, "torch", tmp_path / "out")), inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime", FOREIGN)
def test_other_runtimes_give_the_same(tmp_path: Path, runtime: str, name: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    model, inputs = MODELS[name]()
    program = load_exported(export_model(model, inputs, runtime, tmp_path / "out"))
    if runtime == "onnx" and name == "group_balanced":
        kinds = [node.op_type for node in program.program.graph]
        assert "NonZero" not in kinds and kinds.count("GatherElements") >= 2 * 2  # static shapes, active queries alone
    others = [] if name == "vit" or not RUNTIMES[runtime].is_dynamic else [ids(3, 7), ids(1, 30)]
    assert_equal(model, program, inputs, *others)


@pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=pytest.mark.slow) for name, r in RUNTIMES.items() if r.is_dynamic]
)
@torch.no_grad()
def test_a_text_is_read_and_tokens_are_decoded_with_the_cache(tmp_path: Path, runtime: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    model = tiny_model()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    runners = load_exported(export_model(model, ids(2, 12), runtime, tmp_path / "out", decodes=True)).runners
    model.set_attn_implementation("moh_reference")
    inputs = ids(3, 9)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions, use_cache=True)
    cache = transformers.DynamicCache(config=model.config)
    got = runners["prefill"](**inputs, position_ids=positions, past_key_values=cache)
    assert_close(outputs(got, inputs), outputs(expected, inputs))
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


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    export_model(model, ids(2, 12), "torch", tmp_path / "out")
    assert model.config._attn_implementation == "moh"
    with pytest.raises(ValueError, match=r"exactly one of input_ids or inputs_embeds"):
        export_model(model, dict(unknown=torch.ones(2)), "torch", tmp_path / "other")
    assert model.config._attn_implementation == "moh" and not (tmp_path / "other").exists()


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


@pytest.mark.parametrize("runtime", ["torch", *FOREIGN])
def test_a_damaged_program_is_named(tmp_path: Path, runtime: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    folder = export_model(*vit(), runtime, tmp_path / "out")
    (name,) = (part["file"] for part in json.loads((folder / "export.json").read_text())["components"].values())
    damaged(folder / name)
    with pytest.raises(ValueError, match=rf"export '.*out' can't be loaded: {name} is damaged"):
        load_exported(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"export '.*out' is incomplete: {name} is missing"):
        load_exported(folder)
