"""Promises of published checkpoints: every tensor's name and shape; errors name what does not match."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from transnext_cases import GOLDEN, golden, published_state, stir

from moh.models.published import load_published, named_config
from moh.models.timm.transnext import MoHTransNeXt
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


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_name_is_enough(name):
    layout = json.loads((GOLDEN / "layout_vit.json").read_text(encoding="utf-8"))[name]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in layout.items()}
        config = named_config(name, state)
        model = MoHTransNeXt(
            **{key: value for key, value in config.items() if key not in ("model", "shared_head", "routed_head")},
            shared_heads=config["shared_head"],
            active_heads=config["routed_head"],
        )
    assert {published_names(model)[key]: list(tensor.shape) for key, tensor in model.state_dict().items()} == layout
    assert config["model"] == "transnext" and (config["img_size"], config["num_classes"]) == (224, 1000)


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


ARCHITECTURE = dict(
    embed_dims=(8, 16, 32, 64),
    num_heads=(4, 8, 16, 32),
    depths=(1, 1, 1, 1),
    mlp_ratios=(1, 1, 1, 1),
    img_size=64,
)
"""Few weights with the heads of the base models; those of the small ones have 3, 6, 12 and 24."""
HUB = {
    "moh_transnext_base_75": "Chat-UniVi/MoH-ViT-B-75",
    "moh_transnext_base_50": "Chat-UniVi/MoH-ViT-B-50",
    "moh_transnext_small_75": "Chat-UniVi/MoH-ViT-S-75",
    "moh_transnext_small_80": "Chat-UniVi/MoH-ViT-S-80",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory that stands for the hub: `REPOSITORY/FILE`."""
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    def download(repo_id, filename, **_):
        if not (file := tmp_path / repo_id / filename).is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(file)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    return tmp_path


def narrow(name):
    return ARCHITECTURE if "base" in name else ARCHITECTURE | dict(num_heads=(3, 6, 12, 24), embed_dims=(6, 12, 24, 48))


def publish(hub, name, wrap=lambda state: {"model": state, "args": Namespace(lr=1e-3)}):
    """A file with the published layout; returns the model that it was made from."""
    model = stir(timm.create_model(name, **narrow(name))).eval()
    file = hub / HUB[name] / f"{name}.pth"
    file.parent.mkdir(parents=True)
    theirs = published_names(model)
    torch.save(wrap({theirs[ours]: tensor for ours, tensor in model.state_dict().items()}), file)
    return model


@pytest.mark.parametrize("name", HUB)
@torch.no_grad()
def test_timm_loads_the_published_files_by_name(hub, name):
    model = publish(hub, name)
    images = torch.randn(2, 3, 64, 64)
    for full in (name, f"{name}.moh_in1k"):
        loaded = timm.create_model(full, pretrained=True, **narrow(name)).eval()
        assert torch.equal(loaded(images), model(images))
    assert f"{name}.moh_in1k" in timm.list_pretrained()


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"ema": state, "model": {}}], ids=["a-state-dict", "averaged-weights"]
)
def test_timm_loads_published_files_of_every_layout(hub, wrap):
    name = "moh_transnext_base_50"
    model = publish(hub, name, wrap)
    loaded = timm.create_model(name, pretrained=True, **narrow(name))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_published_weights_get_other_classes_and_channels(hub):
    name = "moh_transnext_base_75"
    model = publish(hub, name)
    loaded = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1, **narrow(name))
    assert loaded(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    same = [key for key in model.state_dict() if not key.startswith(("head.", "stages.0.patch_embed.proj.weight"))]
    assert all(torch.equal(loaded.state_dict()[key], model.state_dict()[key]) for key in same)


def test_a_recipe_starts_from_a_published_file(hub):
    from moh.training.images.model import build_model
    from moh.training.images.recipe import ImageModelRecipe

    name = "moh_transnext_base_75"
    model = publish(hub, name)
    file = str(hub / HUB[name] / f"{name}.pth")
    started = build_model(ImageModelRecipe(name, weights=file, kwargs=narrow(name)), ["ant", "bee"])
    key = "stages.2.blocks.0.attn.router.routed.weight"
    assert torch.equal(started.state_dict()[key], model.state_dict()[key]) and started.num_classes == 2


@pytest.mark.parametrize("name", ["moh_transnext_base_dense", "moh_transnext_micro32_75"])
def test_models_without_published_weights_have_none(name):
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)
