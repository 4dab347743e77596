"""Promises of saved timm models with MoH attention: we and timm load them; what can't be rebuilt is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from timm.models import VisionTransformer

import moh
from moh.models.timm import from_pretrained, save_pretrained

SMALL = dict(embed_dim=32, depth=2, num_heads=4, img_size=32, patch_size=8, num_classes=5)


def stirred(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def preset() -> Any:
    options = dict(depth=2, embed_dim=40, num_heads=5, drop_path_rate=0.1)
    return stirred(timm.create_model("moh_vit_micro_patch4_28_75", router="linear", in_chans=1, **options))


def of_a_base() -> Any:
    options = dict(base="deit_tiny_distilled_patch16_224", shared_heads=[[1], [0, 2]], active_heads=[2, 1])
    return stirred(timm.create_model("moh_vit", **options, **SMALL))


def converted(router: str = "linear") -> Any:
    dense = stirred(timm.create_model("vit_tiny_patch16_224", qk_norm=True, **SMALL))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return moh.convert(dense, shared_heads=1, active_heads=2, router=router, calibration=images, progress=False)


def with_thresholds() -> Any:
    return converted("threshold")


@pytest.mark.parametrize("make", [preset, of_a_base, converted, with_thresholds], ids=lambda make: make.__name__)
@pytest.mark.parametrize("changed", [False, True], ids=["as-made", "other-classes"])
@torch.no_grad()
def test_a_saved_model_comes_back_with_its_weights_and_heads(tmp_path, make, changed) -> None:
    model = make()
    if changed:
        model.reset_classifier(3)
    arguments = (
        {} if hasattr(timm.models, "get_model_args") or make in (preset, of_a_base) else dict(**SMALL, qk_norm=True)
    )
    if changed:
        arguments = arguments | dict(num_classes=3) if arguments else {}
    save_pretrained(model, tmp_path, model_args=arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    side = model.patch_embed.img_size[0]
    x = torch.randn(2, model.patch_embed.proj.in_channels, side, side)
    for other in (from_pretrained(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert type(other) is type(model)
        torch.testing.assert_close(other(x), model(x))
        assert [b.attn.router.config for b in other.blocks] == [b.attn.router.config for b in model.blocks]
    save_pretrained(other, tmp_path)  # again, over the old one


@torch.no_grad()
def test_a_base_made_with_other_arguments_is_noticed(tmp_path) -> None:
    model = converted()
    model.moh_arguments = {"base": "vit_tiny_patch16_224", **SMALL}  # qk_norm is missing, as if not recorded
    model._model_args = {}
    with pytest.raises(ValueError, match=r"make a different model; give those that are missing as model_args"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_pretrained(model, tmp_path, model_args={"qk_norm": True})
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["qk_norm"] is True


def test_an_argument_without_weights_is_noticed_by_the_output(tmp_path) -> None:
    model = of_a_base()
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="the same weights but a different output"):
        save_pretrained(model, tmp_path)


def test_models_that_timm_can_not_make_again_are_refused(tmp_path) -> None:
    dense = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match="model has no MoH attention"):
        save_pretrained(dense, tmp_path)
    model = moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm")
    with pytest.raises(ValueError, match=r"must come from timm.create_model"):
        save_pretrained(model, tmp_path)


def test_a_place_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"):
        from_pretrained(tmp_path / "nothing")
