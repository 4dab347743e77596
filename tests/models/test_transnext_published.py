"""Promises of published checkpoints: every tensor's name and shape; errors name what does not match."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from transnext_cases import GOLDEN, golden, published_state

from moh.models.published import load_published
from moh.models.timm.transnext.published import published_names

PARAMETERS = {
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_tensors_and_parameter_counts(name):
    layout = json.loads((GOLDEN / "layout_vit.json").read_text(encoding="utf-8"))[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    theirs = published_names(model)
    shapes = {theirs[ours]: list(tensor.shape) for ours, tensor in model.state_dict().items()}
    assert shapes == layout
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.fixture
def published():
    config, tensors = golden("transnext_b")
    return config, published_state(tensors)


def test_every_published_tensor_arrives_unchanged(published):
    config, state = published
    model = load_published(state, config)
    theirs = published_names(model)
    assert set(theirs.values()) == set(state)
    assert all(torch.equal(tensor, state[theirs[name]]) for name, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float16), (torch.float32, torch.float32)], ids=str)
def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(published, dtype, expected):
    config, state = published
    model = load_published({name: t.half() for name, t in state.items()}, config, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_the_callers_tensors_are_not_trained_along(published):
    config, state = published
    model = load_published(state, config)
    before = state["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(state["head.weight"], before)


def test_tensors_that_do_not_fit_are_named(published):
    config, state = published
    del state["block1.0.attn.wg.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing tensors: block1\.0\.attn\.wg\.weight; unexpected tensors: extra"):
        load_published(state, config)


@pytest.mark.parametrize("key", ["embed_dims", "shared_head", "routed_head", "img_size"])
def test_a_missing_key_of_the_configuration_is_named(published, key):
    config, state = published
    del config[key]
    with pytest.raises(ValueError, match=f"missing: {key}"):
        load_published(state, config)
