"""Promises of converted diffusion transformers: the original's outputs with all heads active; clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import moh
from moh import record_routing
from moh.conversion.diffusers import UNFITTED, convert_dit
from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.models.diffusers.published import published_state
from moh.models.published import load_published
from moh.routing import Router

SIZES = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8)
PUBLISHED = dict(model="dit", patch_size=2, input_size=8, depth=2, hidden_size=32, num_heads=4, num_classes=5)


def stir(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval()


def diffusers_model(**options) -> DiTTransformer2DModel:
    model = stir(DiTTransformer2DModel(**SIZES | dict(num_embeds_ada_norm=5, out_channels=8) | options))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def our_model() -> nn.Module:
    return stir(MoHDiTTransformer2DModel(**SIZES, num_classes=5))


def published_model() -> nn.Module:
    return load_published(published_state(our_model()), PUBLISHED)


SOURCES = dict(diffusers=diffusers_model, ours=our_model, published=published_model)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return dict(hidden_states=x, timestep=torch.tensor([3, 500, 999]), class_labels=torch.tensor([0, 4, 5]))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("router", UNFITTED)
@pytest.mark.parametrize("heads", [(4, 0), (1, 3), (0, 4), ([[1, 3], [2]], [2, 3])], ids=str)
@torch.no_grad()
def test_with_all_heads_active_outputs_are_the_originals(source, router, heads):
    dense = SOURCES[source]()
    model = convert_dit(dense, shared_heads=heads[0], active_heads=heads[1], router=router)
    assert_same(model(**inputs()).sample, dense(**inputs()).sample)
    assert model.share == 1 and not model.training


@pytest.mark.parametrize("router", ["two_stage", "single_stage"])
@torch.no_grad()
def test_new_routers_let_every_active_head_weigh_one_and_tokens_differ_in_their_heads(router):
    model = convert_dit(diffusers_model(), shared_heads=1, active_heads=1, router=router)
    with record_routing(model) as routing:
        model(**inputs())
    for _, info in routing:
        gates = info.gates
        assert torch.allclose(gates[gates != 0], torch.ones(()), atol=1e-5)
        assert len(info.active.flatten(0, 1).unique(dim=0)) > 1


def test_the_original_stays_as_it_is_and_shares_no_storage():
    dense = diffusers_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = convert_dit(dense, shared_heads=2, active_heads=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_converted_model_trains_saves_and_loads(tmp_path):
    model = convert_dit(diffusers_model(), shared_heads=[1, 2], active_heads=(2, 2)).train()
    model(**inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).sample, model(**inputs()).sample)
    assert loaded.config.norm_eps == 1e-5 and loaded.config.freq_shift == 1  # diffusers' DiT differs in both


def test_the_dtype_is_the_originals():
    model = convert_dit(our_model().to(torch.bfloat16), shared_heads=2, active_heads=1)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("source", ["diffusers", "ours"])
@pytest.mark.parametrize("subfolder", ["", "transformer"], ids=["model", "pipeline"])
@torch.no_grad()
def test_convert_takes_models_and_directories_of_both_kinds(tmp_path, source, subfolder):
    dense = SOURCES[source]()
    dense.save_pretrained(tmp_path / subfolder)
    heads = dict(shared_heads=[2, 3], active_heads=1, router="query_norm")
    expected = convert_dit(dense, **heads)(**inputs()).sample
    for model in (dense, tmp_path, str(tmp_path)):
        assert torch.equal(moh.convert(model, **heads)(**inputs()).sample, expected)


def test_a_pipeline_is_converted_whole_and_the_original_stays(tmp_path):
    dense, vae = diffusers_model(), AutoencoderKL(norm_num_groups=4, block_out_channels=(4,))
    original = DiTPipeline(dense, vae, DDIMScheduler(), id2label={0: "ant, emmet"})
    heads = dict(shared_heads=2, active_heads=1, router="query_norm")
    pipeline = moh.convert(original, **heads)
    assert original.transformer is dense and pipeline.vae is vae and pipeline.labels == {"ant": 0, "emmet": 0}
    with torch.no_grad():
        assert torch.equal(pipeline.transformer(**inputs()).sample, convert_dit(dense, **heads)(**inputs()).sample)
    pipeline.save_pretrained(tmp_path)
    assert isinstance(DiTPipeline.from_pretrained(tmp_path).transformer, MoHDiTTransformer2DModel)


def test_the_balance_losss_weight_is_kept():
    model = moh.convert(our_model(), shared_heads=2, active_heads=1, router="two_stage", router_aux_loss_coef=0.1)
    assert model.config.router_aux_loss_coef == 0.1
    assert {m.balance.coefficient for m in model.modules() if isinstance(m, Router)} == {0.1}


@pytest.mark.parametrize("option", [dict(calibration=torch.ones(1)), dict(refit_output=True), dict(seq_len=8)], ids=str)
def test_convert_refuses_what_only_calibrated_models_have(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out for a diffusion model"):
        moh.convert(our_model(), shared_heads=2, active_heads=1, router="two_stage", **option)


def test_convert_wants_the_number_of_shared_heads():
    with pytest.raises(ValueError, match="shared_heads must be given with active_heads for a diffusion model"):
        moh.convert(our_model(), active_heads=1, router="two_stage")


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"model '{tmp_path}' can't be loaded"):
        convert_dit(tmp_path, shared_heads=2, active_heads=1)


def separate_embeddings() -> DiTTransformer2DModel:
    return stir(diffusers_model())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (diffusers_model, dict(router="linear"), "router must be one of 'two_stage'.* got 'linear'"),
        (diffusers_model, dict(active_heads=4), "layer 0: active_heads must be between 0 and"),
        (diffusers_model, dict(active_heads=[1]), r"active_heads must be .* one entry per layer \(2\), got 1"),
        (lambda: nn.Linear(2, 2), {}, "model must be a DiTTransformer2DModel or a dense model of ours, got Linear"),
        (lambda: diffusers_model(activation_fn="geglu"), {}, "activation_fn must be 'gelu-approximate'.* got 'geglu'"),
        (lambda: diffusers_model(attention_bias=False), {}, "attention_bias must be True"),
        (separate_embeddings, {}, "must share one embedding .* transformer_blocks.1.norm1.emb"),
        (lambda: convert_dit(our_model(), shared_heads=4, active_heads=0), {}, "model is a MoH model already"),
    ],
    ids="router too-many per-layer linear geglu no-bias embeddings moh".split(),
)
def test_what_cannot_be_converted_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        convert_dit(make(), **dict(shared_heads=2, active_heads=1) | options)
