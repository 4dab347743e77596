"""Promises of exported models: each runtime gives PyTorch's numbers, and a program of static shapes keeps the saving.

The runtimes' tests are run by `make test-engines`, those of `torch.export` and of bad input by default.
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
from moh.models.transformers import exported  # noqa: E402
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


def needs(runtime: str) -> None:
    for module in RUNTIMES[runtime].needs:
        pytest.importorskip(module, reason=f"{module} is not installed: make test-engines")


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
    [("linear", "group_balanced"), ("query_norm", "group_balanced"), ("two_stage", "head"), ("query_norm", "head")],
)
def test_a_program_of_torch_export_gives_the_same(tmp_path: Path, router: str, unit: str) -> None:
    model, inputs = tiny_model(router, routing_unit=unit), ids(2, 12)
    assert_equal(model, load_exported(export_model(model, inputs, "torch", tmp_path / "out")), inputs)


@pytest.mark.parametrize("name", ["threshold", "fixed", "encoder", "vit"])
def test_other_models_are_programs_of_torch_export_too(tmp_path: Path, name: str) -> None:
    model, inputs = MODELS[name]()
    assert_equal(model, load_exported(export_model(model, inputs, "torch", tmp_path / "out")), inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime", FOREIGN)
def test_other_runtimes_give_the_same(tmp_path: Path, runtime: str, name: str) -> None:
    needs(runtime)
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
    needs(runtime)
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


@pytest.mark.parametrize(
    ("model", "runtime", "options", "message"),
    [
        (tiny_model, "tflite", {}, r"runtime must be one of 'onnx', 'openvino', 'executorch', 'torch', got 'tflite'"),
        (lambda: torch.nn.Linear(2, 2), "torch", {}, r"model must be a model of transformers, got Linear"),
        (tiny_model, "torch", dict(decodes=True), r"fixed shapes, while the cache grows .* 'onnx' or 'openvino' can"),
        (lambda: vit()[0], "torch", dict(decodes=True), r"decodes must be False for a model that writes no text"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, model: Callable[[], Any], runtime: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(model(), ids(2, 12), runtime, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_one_sample_is_refused_where_any_number_should_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: object())
    message = rf"2 or more samples for runtime '{runtime}', .* got input_ids of shape \(1, 12\)"
    with pytest.raises(ValueError, match=message):
        export_model(tiny_model(), ids(1, 12), runtime, tmp_path)


def test_a_runtime_that_is_missing_is_named_with_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript onnxruntime$"):
        export_model(tiny_model(), ids(2, 12), "onnx", tmp_path)


@pytest.mark.parametrize("version", ["5.17.0", "5.22.0"])
def test_a_transformers_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    for call in (lambda: export_model(tiny_model(), ids(2, 12), "torch", tmp_path), lambda: load_exported(tmp_path)):
        with pytest.raises(
            ImportError, match=rf"exports need transformers 5.23.0 or newer, and {version} is installed"
        ):
            call()


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


@pytest.mark.parametrize("runtime", ["torch", *FOREIGN])
def test_a_damaged_program_is_named(tmp_path: Path, runtime: str) -> None:
    needs(runtime)
    folder = export_model(*vit(), runtime, tmp_path / "out")
    (name,) = (part["file"] for part in json.loads((folder / "export.json").read_text())["components"].values())
    damaged(folder / name)
    with pytest.raises(ValueError, match=rf"export '.*out' can't be loaded: {name} is damaged"):
        load_exported(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"export '.*out' is incomplete: {name} is missing"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"directory must hold an export, .* but there is no '.*export.json'"),
        ("{", r"export.json' is damaged"),
        ("[]", r"export.json' is damaged"),
        ('{"export_format": "onnx"}', r"export.json' is damaged: 'components'"),
        ('{"export_format": "coreml", "components": {}}', r"export_format of onnx, .* got 'coreml'"),
    ],
)
def test_a_directory_that_holds_no_export_is_refused(tmp_path: Path, manifest: str | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / "export.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path)
