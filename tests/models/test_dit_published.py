"""Promises of published DiT checkpoints: every tensor's name and shape; errors name what does not match."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from dit_cases import GOLDEN, assert_close, golden, published_state, tiny_inputs, tiny_model

from moh.models.diffusers import create_dit
from moh.models.diffusers import published as dit_checkpoints
from moh.models.published import load_published

LAYOUT = json.loads((GOLDEN / "layout_dit.json").read_text(encoding="utf-8"))
PARAMETERS = {
    "MoH-DiT-XL/2-90": 675_666_464,
    "MoH-DiT-XL/2-75": 675_689_504,
    "MoH-DiT-L/2-90": 458_512_416,
    "MoH-DiT-L/2-75": 458_528_800,
    "MoH-DiT-B/2-90": 130_638_368,
    "MoH-DiT-B/2-75": 130_638_368,
    "MoH-DiT-S/2-90": 32_997_152,
    "MoH-DiT-S/2-75": 32_998_688,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_tensors_and_parameter_counts(name):
    preset = "moh_" + name.removeprefix("MoH-").replace("/", "_").replace("-", "_").lower()
    with torch.device("meta"):
        model = create_dit(preset)
    ours = dit_checkpoints.published_state(model)
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == LAYOUT[name]
    # The published counts include the positions, which are not trained; here they are not parameters.
    assert model.num_parameters() + model.pos_embed.numel() == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_name_is_enough_with_the_sizes_of_the_tensors(name, monkeypatch):
    shapes = LAYOUT[name]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    made = {}
    monkeypatch.setattr(dit_checkpoints, "load", lambda state, config, dtype: made.update(config))
    load_published(state, name)
    sizes = create_dit_arguments(name)
    assert (made["shared_head"], made["routed_head"]) == (sizes["shared_heads"], sizes["active_heads"])
    assert (made["input_size"], made["num_classes"], made["patch_size"]) == (32, 1000, 2)
    monkeypatch.undo()
    state["pos_embed"] = torch.empty(1, 32 * 32, shapes["pos_embed"][2], device="meta")  # 512 x 512 pixels
    state["y_embedder.embedding_table.weight"] = torch.empty(11, shapes["pos_embed"][2], device="meta")
    other = dit_checkpoints.named_config(name, state)
    assert (other["input_size"], other["num_classes"]) == (64, 10)


def create_dit_arguments(name):
    from moh.models.diffusers.presets import architecture

    return architecture("moh_" + name.removeprefix("MoH-").replace("/", "_").replace("-", "_").lower())


def test_the_smallest_published_model_loads_by_its_name():
    state = {key: torch.zeros(shape) for key, shape in LAYOUT["MoH-DiT-S/2-75"].items()}
    model = load_published(state, "MoH-DiT-S/2-75")
    assert model.config.sample_size == 32 and model.config.num_classes == 1000
    assert model.share == pytest.approx(create_dit("moh_dit_s_2_75").share)


@pytest.mark.parametrize("name", ["MoH-DiT-M/2-90", "moh_transnext_base_60", "dit"])
def test_a_name_that_no_published_model_has_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"config must be a mapping or one of moh_transnext.*MoH-DiT-XL/2-90.*got"):
        load_published({}, name)


def test_tensors_without_what_the_sizes_come_from_are_refused():
    with pytest.raises(ValueError, match=r"must have the tensors pos_embed, y_embedder.*, which are missing"):
        load_published({"x_embedder.proj.weight": torch.zeros(1)}, "MoH-DiT-S/2-90")


@pytest.fixture(params=["dit_a", "dit_b"])
def published(request):
    config, tensors = golden(request.param)
    return config, published_state(tensors)


def test_every_published_tensor_arrives_unchanged_and_goes_back(published):
    config, state = published
    model = load_published(state, config)
    back = dit_checkpoints.published_state(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_training_checkpoint_gives_its_averaged_weights(published, tmp_path):
    config, state = published
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(
        {"model": raw, "ema": state, "opt": {}, "args": argparse.Namespace(model="DiT")}, tmp_path / "0400000.pt"
    )
    model = load_published(tmp_path / "0400000.pt", config)
    assert all(torch.equal(state[name], tensor) for name, tensor in dit_checkpoints.published_state(model).items())


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_mapped_if_it_can_be_and_then_let_go(published, tmp_path, monkeypatch, mapped):
    config, state = published
    file = tmp_path / "0400000.pt"
    torch.save({"ema": state, "opt": {}}, file, _use_new_zipfile_serialization=mapped)
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs))
    model = load_published(file, config)
    assert asked[0]["mmap"] is mapped and asked[0]["weights_only"]
    file.write_bytes(bytes(file.stat().st_size))  # in place: a tensor that still reads the file would become 0
    assert all(torch.equal(state[name], tensor) for name, tensor in dit_checkpoints.published_state(model).items())


@torch.no_grad()
def test_a_checkpoint_without_routing_is_the_dense_model():
    dense = tiny_model(dense=True, norm_eps=1e-6)
    config = dict(
        model="dit", patch_size=2, input_size=8, depth=3, hidden_size=32, num_heads=4, num_classes=5, in_channels=3
    )
    model = load_published(dit_checkpoints.published_state(dense), config)
    assert model.layer_configs() == []
    assert_close(model(*tiny_inputs()).sample, dense(*tiny_inputs()).sample, 1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float16), (torch.float32, torch.float32)], ids=str)
def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(published, dtype, expected):
    config, state = published
    model = load_published({name: t.half() for name, t in state.items()}, config, dtype=dtype)
    assert model.dtype == expected
    assert {t.dtype for t in model.state_dict().values()} == {expected}


def test_the_callers_tensors_are_not_trained_along(published):
    config, state = published
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = load_published(state, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_tensors_that_do_not_fit_are_named(published):
    config, state = published
    del state["blocks.1.attn.qkv.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing tensors: blocks\.1\.attn\.qkv\.bias; unexpected tensors: extra"):
        load_published(state, config)


@pytest.mark.parametrize("key", ["patch_size", "input_size", "depth", "hidden_size", "num_heads", "num_classes"])
def test_a_missing_key_of_the_configuration_is_named(published, key):
    config, state = published
    del config[key]
    with pytest.raises(ValueError, match=f"missing: {key}"):
        load_published(state, config)


def test_shared_without_routed_heads_and_unknown_norms_are_refused(published):
    config, state = published
    with pytest.raises(ValueError, match="norm_eps"):
        load_published(state, config | {"norm_eps": 1e-5})
    del config["routed_head"]
    with pytest.raises(ValueError, match="shared_heads and active_heads must both be given"):
        load_published(state, config)


def test_heads_per_layer_need_their_width(published):
    config, state = published
    heads = [config["num_heads"]] * config["depth"] if isinstance(config["num_heads"], int) else config["num_heads"]
    without = {key: value for key, value in config.items() if key != "head_dim"} | {"num_heads": heads}
    with pytest.raises(ValueError, match="must have the key head_dim"):
        load_published(state, without)
