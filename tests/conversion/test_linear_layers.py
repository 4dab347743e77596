"""Routers are not linear layers to whoever looks for these: quantisers, PEFT's "all-linear"; and start as if they were."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the llm extra is not installed")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

import moh.models.transformers
from moh import MoHAttention, record_routing
from moh.routing import Scorer

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import ALL, BY_TYPE, TRAINED_HEAD, dense_model, token_ids

LEARNED = ["two_stage", "single_stage", "linear"]
HEADS: dict[str, Any] = dict(shared_heads=2, active_heads=1)


def routed_model(dense: Any, router: str = "two_stage", auto: str | None = None, **options: Any) -> Any:
    """A new MoH model of a dense one's configuration."""
    model_type = dense.config.model_type
    family = BY_TYPE[model_type]
    fields = {name: value for name, value in dense.config.to_dict().items() if name != "model_type"}
    config = getattr(moh.models.transformers, family.moh_config)(**fields | HEADS | dict(router=router) | options)
    torch.manual_seed(0)
    kind = getattr(moh.models.transformers, family.moh_models[auto or TRAINED_HEAD[model_type]])
    return kind(config).eval()


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def scorers(model: nn.Module) -> dict[str, Scorer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Scorer)}


@pytest.mark.parametrize("router", LEARNED)
@pytest.mark.parametrize("model_type", ALL)
def test_linear_layers_are_those_of_the_dense_family(model_type, router) -> None:
    dense = dense_model(model_type)
    model = routed_model(dense, router)
    assert linear_layers(model) == linear_layers(dense)
    of_routers = {name for name, _ in model.named_parameters() if ".router." in name}
    assert of_routers == {f"{name}.{t}" for name, s in scorers(model).items() for t, _ in s.named_parameters()} != set()


@pytest.mark.parametrize("model_type", ALL)
def test_quantisers_of_transformers_get_the_layers_of_the_dense_family(model_type) -> None:
    def converted(model: Any) -> set[str]:
        keys = get_keys_to_not_convert(model)
        return {name for name in linear_layers(model) if should_convert_module(name, keys)}

    dense = dense_model(model_type)
    assert converted(routed_model(dense)) == converted(dense)


def test_layers_of_images_and_diffusion_have_no_linear_router() -> None:
    timm = pytest.importorskip("timm", reason="the vision extra is not installed")
    models = [
        MoHAttention(16, 4, **HEADS),
        timm.create_model("moh_vit_micro_patch4_28_75"),
        timm.create_model("moh_vit", base="vit_tiny_patch16_224", depth=1, active_heads=1, shared_heads=1),
    ]
    models.append(_transnext())
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    models.append(_dit())
    for model in models:
        assert scorers(model) and not any("router." in name for name in linear_layers(model))


# How routers start


@pytest.mark.parametrize("bias", [True, False])
def test_a_scorer_starts_and_computes_as_a_linear_layer(bias) -> None:
    def made(kind: type[nn.Module]) -> Any:
        torch.manual_seed(0)
        return kind(5, 3, bias), torch.rand(())

    (scorer, after), (linear, expected) = made(Scorer), made(nn.Linear)
    assert after == expected
    assert scorer.state_dict().keys() == linear.state_dict().keys()
    scorer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 4, 5)
    assert torch.equal(scorer(x), linear(x))
    for module in (scorer, linear):
        torch.manual_seed(1)
        module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(scorer.parameters(), linear.parameters(), strict=True))
    assert scorer.as_linear().weight is scorer.weight and scorer.as_linear().bias is scorer.bias
    assert copy.deepcopy(scorer)(x).equal(linear(x))


@pytest.mark.parametrize("model_type", ALL)
def test_routers_of_transformers_start_as_the_familys_linear_layers(model_type) -> None:
    options = {"init_std" if model_type == "opt" else "initializer_range": 0.5}
    model = routed_model(dense_model(model_type), "linear", **options)
    weights = torch.cat([scorer.weight.detach().flatten() for scorer in scorers(model).values()])
    assert float(weights.std()) == pytest.approx(0.5, rel=0.2)
    assert not any(scorer.bias.any() for scorer in scorers(model).values())


def test_routers_of_timm_start_with_truncated_normals_also_when_timm_starts_again() -> None:
    timm = pytest.importorskip("timm", reason="the vision extra is not installed")
    model = timm.create_model("moh_vit_micro_patch4_28_75", router="linear")
    for start in (lambda: None, model.init_weights, lambda: model.init_weights("jax")):
        start()
        for scorer in scorers(model).values():
            assert float(scorer.weight.detach().std()) == pytest.approx(0.02, rel=0.2) and not scorer.bias.any()
        with torch.no_grad():
            for scorer in scorers(model).values():
                scorer.bias.fill_(1.0)


def test_routers_of_transnext_and_dit_start_as_their_linear_layers() -> None:
    pytest.importorskip("timm", reason="the vision extra is not installed")
    for scorer in scorers(_transnext()).values():
        assert float(scorer.weight.detach().std()) == pytest.approx(0.02, rel=0.5) and scorer.weight.abs().max() < 0.1
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    for scorer in scorers(_dit()).values():
        bound = math.sqrt(6 / sum(scorer.weight.shape))
        assert 0.8 * bound < float(scorer.weight.detach().abs().max()) <= bound and not scorer.bias.any()


def _transnext() -> nn.Module:
    from moh.models.timm.transnext import MoHTransNeXt

    sizes = dict(img_size=32, patch_size=2, embed_dims=(8, 16), num_heads=(4, 4), depths=(1, 1), mlp_ratios=(2, 2))
    return MoHTransNeXt(**sizes, sr_ratios=(2, 1), num_classes=5, shared_heads=(2, 1), active_heads=(1, 2))


def _dit() -> nn.Module:
    from moh.models.diffusers import MoHDiTTransformer2DModel

    sizes = dict(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, num_classes=5, in_channels=3
    )
    return MoHDiTTransformer2DModel(**sizes, **HEADS, router="linear")


# Libraries that look for linear layers


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "bert"])
def test_all_linear_of_peft_adapts_what_it_adapts_in_the_dense_family(model_type) -> None:
    peft = pytest.importorskip("peft")
    dense = dense_model(model_type)
    adapted = []
    for model in (dense, routed_model(dense, "linear")):
        config = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=model_type == "gpt2")
        wrapped = peft.get_peft_model(model, config)
        adapted.append({name for name, parameter in wrapped.named_parameters() if parameter.requires_grad})
    assert adapted[0] == adapted[1] != set()


def sensitive_model(**options: Any) -> Any:
    """A Llama that quantisation changes little, whose scores are close enough that it would change choices of heads."""
    model = routed_model(dense_model("llama", **options), "linear")
    with torch.no_grad():
        for scorer in scorers(model).values():
            scorer.weight.normal_(std=0.02)
            scorer.weight[:, 0] *= 1000  # as fitted ones: far larger along what hardly differs between heads
            scorer.weight[:, 0] = scorer.weight[0, 0]
    return model


@torch.no_grad()
def choices_of(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The heads that each layer's router chooses for the same inputs."""
    return [
        layer.self_attn.router(x.to(layer.self_attn.router.contribution.weight.dtype)).active
        for layer in model.model.layers
    ]


def assert_routed_as_before(quantised: Any, model: Any) -> None:
    """Routers are those of `model`, choose the same heads, and the model runs and generates."""
    for name, scorer in scorers(model).items():
        found = quantised.get_submodule(name)
        assert type(found) is Scorer and type(found.weight) is nn.Parameter
        assert torch.equal(found.weight, scorer.weight.to(found.weight.dtype))
    x = torch.randn(4, 50, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for now, before in zip(choices_of(quantised, x), choices_of(model, x), strict=True):
        assert torch.equal(now, before)
    ids = token_ids(2, 12)
    with torch.no_grad(), record_routing(quantised) as routing:
        logits = quantised(ids).logits.float()
    assert routing.share() == pytest.approx(3 / 4)
    assert (logits - model(ids).logits).norm() < 0.2 * logits.norm()
    assert quantised.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


def test_torchao_leaves_routers_as_they_are() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = sensitive_model()
    quantised = copy.deepcopy(model)
    quantize_(quantised, Int8WeightOnlyConfig())
    assert type(quantised.model.layers[0].self_attn.q_proj.weight) is not nn.Parameter
    assert_routed_as_before(quantised, model)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_leaves_routers_as_they_are(tmp_path, bits) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = sensitive_model(hidden_size=64, intermediate_size=64, head_dim=16)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    assert isinstance(quantised.model.layers[0].self_attn.q_proj, kind)
    assert_routed_as_before(quantised, model)
