"""Quantised weights: routers stay as they are, no kernel reads integers as weights, and what can't work is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import moh
import moh.attention.cpu
from moh.attention import projections
from moh.cli.main import main
from moh.models.dial import moh_routers
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.routing import Scorer

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


class Int8Weight(Tensor):
    """Integers and a scale for each row, shown to others as float32: as torchao's classes do, it knows linear maps alone."""

    def __new__(cls, integers: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=integers.device)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return cls(parts["integers"], parts["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.integers * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(f"Int8Weight has no {function}")


def wrapped(model: nn.Module) -> nn.Module:
    for linear in [module for module in model.modules() if type(module) is nn.Linear]:
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        linear.weight = nn.Parameter(Int8Weight((weight / scale).round().to(torch.int8), scale), requires_grad=False)
    return model


def torchao_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int4(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerGroup

    quantization.quantize_(model, quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(16)))
    return model


def dynamic_int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


QUANTISERS = [
    wrapped,
    torchao_int8,
    torchao_int4,
    pytest.param(dynamic_int8, marks=pytest.mark.filterwarnings("ignore")),
]
Quantise = Callable[[nn.Module], nn.Module]


def routed(**options: Any) -> Any:
    torch.manual_seed(0)
    config = MoHLlamaConfig(**SIZES, router="linear", shared_heads=1, active_heads=1, **options)
    return MoHLlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(64, (1, 80), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_attention_computes_active_heads_and_projections_are_the_quantisers(quantise: Quantise, ids: Tensor) -> None:
    plain, model = routed(), quantise(routed())
    scorers = [module for module in model.modules() if isinstance(module, Scorer)]
    for scorer, as_before in zip(scorers, (m for m in plain.modules() if isinstance(m, Scorer)), strict=True):
        assert type(scorer.weight) is nn.Parameter and torch.equal(scorer.weight, as_before.weight)
    layer, x = model.model.layers[0].self_attn, torch.zeros(1, 80, 32)
    reasons = projections.projections_passed_over(layer.q_proj, x, "queries", 4, share=0.5)
    assert "quantised" in str(reasons["cpu"])
    with torch.no_grad():
        ours = model(ids).logits
        model.set_attn_implementation("moh_reference")
        torch.testing.assert_close(ours, model(ids).logits, atol=1e-5, rtol=1e-4)
        assert not torch.equal(ours, plain(ids).logits)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_tokens_are_decoded_as_the_text_is_read(quantise: Quantise, ids: Tensor) -> None:
    model = quantise(routed())
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits
        # dynamic quantisation chooses a scale for all activations of a call together
        tolerance = 0.05 if quantise is dynamic_int8 else 1e-5
        torch.testing.assert_close(last[0, -1], model(ids).logits[0, -1], atol=tolerance, rtol=tolerance)


class Operators(TorchDispatchMode):
    """Names of our operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def int8(kind: str) -> Any:
    """A model with torchao's int8 weights of a kind."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = routed()
    if kind == "zero points":
        for linear in [module for module in model.modules() if type(module) is nn.Linear]:
            weight = quantization.Int8Tensor.from_hp(
                linear.weight, quantization.PerRow(), mapping_type=quantization.MappingType.ASYMMETRIC
            )
            linear.weight = nn.Parameter(weight, requires_grad=False)
        return model
    configs = {
        "rows": quantization.Int8WeightOnlyConfig(),
        "tensors": quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
        "activations too": quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    quantization.quantize_(model, configs[kind])
    return model


@pytest.mark.skipif(moh.attention.cpu.unavailable() is not None, reason="there are no CPU kernels")
@pytest.mark.parametrize("kind", ["rows", "tensors", "zero points", "activations too"])
@torch.no_grad()
def test_torchaos_int8_weights_by_row_are_decoded_by_the_operators(kind: str, ids: Tensor) -> None:
    model = int8(kind)
    expected = model(ids).logits[0, -1]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with Operators() as operators:
        last = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[0, -1], expected, atol=1e-5, rtol=1e-4)
    found = [name.removeprefix("moh::cpu_decode_") for name in operators.names if name.startswith("moh::cpu_decode")]
    layer = ["norm", "layer", "mlp"]
    assert found == ([*layer, *layer, "linear"] if kind == "rows" else [])


@pytest.mark.parametrize("kind", ["rows", "zero points"])
def test_zero_points_are_looked_up_again_after_they_were_changed(kind: str) -> None:
    head, x = int8(kind).lm_head, torch.zeros(1, 1, 32)
    for has_zero_points in (kind == "zero points", kind != "zero points"):
        head.weight.zero_point.fill_(int(has_zero_points))
        assert (projections.matrix_of(head, x) is None) == has_zero_points


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_bias_of_another_dtype_keeps_int8_weights_from_the_operators(dtype: torch.dtype) -> None:
    head, x = int8("rows").lm_head, torch.zeros(1, 1, 32)
    head.bias = nn.Parameter(torch.zeros(64, dtype=dtype), requires_grad=False)
    assert (projections.matrix_of(head, x) is None) == (dtype is torch.float64)


@pytest.mark.parametrize("quantise", QUANTISERS[:2])
def test_compiled_it_computes_the_same(quantise: Quantise, ids: Tensor) -> None:
    model = quantise(routed())
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_the_dial_turns_unless_each_number_of_heads_has_its_weights(quantise: Quantise) -> None:
    assert moh.set_active_heads(quantise(routed()), 2) == 0.75
    model = quantise(routed(output_changes={"heads": [2, 3], "rank": 2, "used_heads": [2, 2]}))
    with pytest.raises(ValueError, match=r"are quantised .*; turn the dial before quantising"):
        moh.set_active_heads(model, 2)
    assert [router.config.active_heads for router in moh_routers(model)] == [1, 1]


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_quantised_model_is_not_converted(quantise: Quantise) -> None:
    dense = quantise(LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False))
    with pytest.raises(ValueError, match="model is quantised, and its weights can't be calibrated"):
        moh.convert(dense, router="query_norm", shared_heads=1, active_heads=1)


def torchaos(kind: str, granularity: str) -> dict[str, Any]:
    """What transformers saves of `TorchAoConfig`."""
    of_weights = {"_type": granularity, "_version": 1, "_data": {"dim": -1} if granularity == "PerRow" else {}}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": kind, "_version": 2, "_data": {"granularity": of_weights}}},
    }


@pytest.mark.parametrize(
    "saved, says_operators",
    [
        pytest.param({"quant_method": "bitsandbytes", "load_in_8bit": True}, False, id="bitsandbytes"),
        pytest.param(torchaos("Int8WeightOnlyConfig", "PerRow"), True, id="int8-rows"),
        pytest.param(torchaos("Int8WeightOnlyConfig", "PerTensor"), False, id="int8-tensors"),
        pytest.param(torchaos("Int8DynamicActivationInt8WeightConfig", "PerRow"), False, id="activations-too"),
        pytest.param({"quant_method": "torchao", "quant_type": "int8_weight_only"}, False, id="of-an-old-version"),
    ],
)
def test_info_says_whose_products_compute_quantised_projections(
    saved: dict[str, Any], says_operators: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routed().config.save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    assert "quantised" not in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": saved}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["info", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"quantised ({saved['quant_method']}): dense products" in out
    assert ("a new token on the CPU by our operators" in out) == says_operators
