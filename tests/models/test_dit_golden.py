"""Promise: equal to the published MoH-DiT on two tiny random models (`tests/golden/dit_*.safetensors`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from dit_cases import assert_close, golden, published_state

from moh import record_routing
from moh.models.diffusers import guided_output
from moh.models.published import load_published


@pytest.fixture(params=["dit_a", "dit_b"])
def case(request):
    config, tensors = golden(request.param)
    return load_published(published_state(tensors), config), tensors


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"], ids=str)
@torch.no_grad()
def test_output_and_balance_losses(case, backend):
    model, expected = case
    for block in model.transformer_blocks:
        block.attn.backend = backend
    with record_routing(model) as routing:
        output = model(expected["input"], expected["t"], expected["y"]).sample
    assert_close(output, expected["output"])
    losses = [info.balance_loss() for _, info in routing if info.probs is not None]
    assert_close(torch.stack(losses), expected["balance_losses"])


@torch.no_grad()
def test_guided_output_with_the_first_three_channels_guided(case):
    model, expected = case
    conditional, unconditional = expected["cfg4_output"].chunk(2)
    no_class = model.config.num_classes
    inputs = (model, expected["input"], expected["t"], expected["y"])
    guided = guided_output(*inputs, guidance=4, null_class=no_class, guided_channels=3)
    assert_close(guided, conditional)
    assert_close(guided[:, :3], unconditional[:, :3])
    plain = model(expected["input"], expected["t"], torch.full_like(expected["y"], no_class)).sample
    assert_close(plain[:, 3:], unconditional[:, 3:])


@torch.no_grad()
def test_positions_are_computed_as_in_the_published_models(case):
    model, _ = case
    fresh = type(model).from_config(model.config)
    assert_close(fresh.pos_embed, model.pos_embed, 1e-6)
