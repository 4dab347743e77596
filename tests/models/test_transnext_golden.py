"""Promise: equal to the published implementation on tiny random models (`tests/golden/transnext_*.safetensors`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

from transnext_cases import assert_close, golden, published_state

import moh
from moh.models.published import load_published
from moh.models.timm.transnext.published import published_names

FORWARD, GRADIENT = 1e-5, 1e-4


@pytest.fixture(params=["transnext_a", "transnext_b"])
def case(request):
    config, tensors = golden(request.param)
    return load_published(published_state(tensors), config), tensors


@pytest.fixture(params=[None, "reference"], ids=["fastest", "reference"], autouse=True)
def backend(request, case):
    for module in case[0].modules():
        if hasattr(module, "backend"):
            module.backend = request.param


@torch.no_grad()
def test_features_and_logits(case):
    model, tensors = case
    features = model.forward_head(model.forward_features(tensors["input"]), pre_logits=True)
    assert_close(features, tensors["features"], FORWARD)
    assert_close(model(tensors["input"]), tensors["logits"], FORWARD)


def test_training_logits_balance_losses_total_loss_and_gradients(case):
    model, tensors = case
    model.train()
    with moh.record_routing(model) as routing:
        logits = model(tensors["input"])
    assert_close(logits, tensors["train_logits"], FORWARD)
    losses = torch.stack([info.balance_loss() for _, info in routing if info.probs is not None])
    assert_close(losses, tensors["balance_losses"], FORWARD)
    loss = logits.square().mean() + 0.01 * routing.balance_loss()
    assert_close(loss.reshape(1), tensors["loss"], FORWARD)

    loss.backward()
    theirs = published_names(model)
    named = {theirs[name]: parameter for name, parameter in model.named_parameters()}
    expected = {name.removeprefix("grad."): t for name, t in tensors.items() if name.startswith("grad.")}
    assert len(expected) > 25
    for name, gradient in expected.items():
        assert_close(named[name].grad, gradient, GRADIENT)
