"""Promises of the named diffusion transformers: shares of heads as in the name, controls of equal size, overrides."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from moh.models.diffusers import DIT_NAMES, create_dit

ROUTED = [name for name in DIT_NAMES if name.startswith("moh_")]
SIZES = sorted({re.sub(r"^moh_|_(90|75)$", "", name) for name in ROUTED})


def on_meta(name: str, **overrides):
    with torch.device("meta"):
        return create_dit(name, **overrides)


def test_every_size_comes_with_two_shares_and_a_dense_control():
    assert SIZES == ["dit_b_2", "dit_l_2", "dit_micro_2", "dit_micro_4", "dit_s_2", "dit_xl_2"]
    assert set(DIT_NAMES) == {*SIZES, *(f"moh_{size}_{share}" for size in SIZES for share in (75, 90))}


@pytest.mark.parametrize("name", ROUTED)
def test_the_share_of_heads_is_the_one_in_the_name(name):
    assert round(on_meta(name).share, 2) == int(name[-2:]) / 100 or (name, on_meta(name).share) == (
        "moh_dit_s_2_90",
        pytest.approx(64 / 72),  # the published S/2 at "90"
    )


@pytest.mark.parametrize("name", [name for name in ROUTED if "_xl_" not in name and "_l_" not in name])
def test_the_control_has_the_same_parameters_up_to_the_routers(name):
    moh, dense = on_meta(name), on_meta(name.removeprefix("moh_")[:-3])
    shapes = {key: p.shape for key, p in moh.named_parameters() if ".router." not in key}
    assert shapes == {key: p.shape for key, p in dense.named_parameters()}


@pytest.mark.parametrize("name", ["dit_xl_2", "dit_l_2"])
def test_controls_of_models_with_growing_layers_have_as_many_heads_in_all(name):
    dense = on_meta(name).num_parameters()
    for share in (75, 90):
        moh = on_meta(f"moh_{name}_{share}")
        routers = sum(p.numel() for key, p in moh.named_parameters() if ".router." in key)
        assert moh.num_parameters() - routers == pytest.approx(dense, rel=0.01)


@pytest.mark.parametrize("name", [name for name in DIT_NAMES if "micro" in name])
@torch.no_grad()
def test_small_ones_draw_small_images_of_any_channels(name):
    model = create_dit(name, sample_size=8, in_channels=1, num_classes=3)
    sample = model(torch.randn(2, 1, 8, 8), torch.tensor(5), torch.tensor([0, 3])).sample
    assert sample.shape == (2, 2, 8, 8)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of .*moh_dit_s_2_75.*, got 'dit_m_2'"):
        create_dit("dit_m_2")


def test_an_image_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="sample_size must be a multiple of patch_size = 4, got 30"):
        on_meta("dit_micro_4", sample_size=30)
