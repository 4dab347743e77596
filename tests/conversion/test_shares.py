"""Promise: a share of the heads is all that a conversion needs; layers get the nearest numbers of heads that they allow."""

from __future__ import annotations

import pytest
import torch

from moh import MoHConfig, convert
from moh.models.heads import DEFAULT_SHARE, heads_of_share, requested_share
from moh.training.recipes import load_recipe


@pytest.mark.parametrize(
    ("share", "num_heads", "default_shared", "step", "expected"),
    [
        (0.75, 9, 2, 1, (2, 5)),
        (0.75, 32, 16, 1, (16, 8)),  # the paper's MoH-LLaMA3-8B
        (0.5, 32, 16, 1, (10, 6)),  # not 16 shared ones and nothing to choose
        (0.5, 9, 2, 1, (2, 3)),
        (1, 12, 3, 1, (3, 9)),
        (0.1, 6, 1, 1, (0, 1)),
        (0.75, 32, 7, 8, (0, 24)),
        (0.75, 32, 8, 4, (8, 16)),
    ],
)
def test_a_share_becomes_shared_and_active_heads(share, num_heads, default_shared, step, expected) -> None:
    heads = heads_of_share(share, num_heads, default_shared=default_shared, step=step)
    assert heads == expected
    assert sum(heads) % step == 0 and heads[0] % step == 0
    MoHConfig(num_heads, *heads)


def test_a_share_below_half_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be at least 0.111, one head of a layer's 9, got 0.05"):
        heads_of_share(0.05, 9, default_shared=2)
    with pytest.raises(ValueError, match="one choice of 8 heads of a layer's 32"):
        heads_of_share(0.1, 32, default_shared=7, step=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(share=0.5, active_heads=3),
            "share must be left out where shared_heads or active_heads is given, got 0.5",
        ),
        (dict(share=0.5, shared_heads=1), "share must be left out where"),
        (dict(share=0.5, shared_heads=[0, 1], active_heads=[1]), "share must be left out where"),
        (dict(shared_heads=1), "active_heads must be given with shared_heads = 1"),
        (dict(share=75), "share must be a number above 0 and at most 1, such as 0.75 of all heads, got 75"),
        (dict(share=0), "share must be a number above 0"),
        (dict(share=True), "share must be a number above 0"),
        (dict(share="0.75"), "share must be a number above 0"),
        (dict(share=float("nan")), "share must be a number above 0"),
    ],
)
def test_a_share_and_numbers_exclude_each_other(make_dense, tokens, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        requested_share(**arguments)
    with pytest.raises(ValueError, match=message):
        convert(make_dense(), calibration=tokens, **arguments)


def test_three_quarters_are_the_default(make_dense, tokens) -> None:
    assert requested_share() == DEFAULT_SHARE == 0.75
    assert requested_share(active_heads=3) is None
    model = convert(make_dense(), calibration=tokens, progress=False)
    assert model.config.share == 0.75


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 1.0])
def test_even_layers_all_get_the_nearest_number(make_dense, tokens, share) -> None:
    model = convert(make_dense(), share=share, calibration=tokens, allocation="even", progress=False)
    used = [c.num_shared + c.active_heads for c in model.config.layer_configs()]
    nearest = int(share * model.config.num_attention_heads + 0.5)
    assert used == [nearest] * len(used)


@pytest.mark.parametrize("share", [0.55, 0.6, 0.7, 0.75])
def test_uneven_layers_have_the_nearest_sum(make_dense, tokens, share) -> None:
    model = convert(make_dense(), share=share, calibration=tokens, allocation="sensitivity", progress=False)
    layers = model.config.layer_configs()
    heads = sum(c.num_heads for c in layers)
    assert sum(c.num_shared + c.active_heads for c in layers) == int(share * heads + 0.5)


def test_the_papers_router_shares_two_thirds_of_the_heads_in_use(make_dense) -> None:
    model = convert(make_dense(), share=0.75, router="query_norm")
    assert (model.config.shared_heads, model.config.active_heads) == (2, 1)


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_diffusion_model_is_converted_at_a_share(share) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=8, attention_head_dim=4, num_layers=2, sample_size=4, in_channels=4)
    dense = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5, out_channels=8)
    dense.transformer_blocks[1].norm1.emb.load_state_dict(dense.transformer_blocks[0].norm1.emb.state_dict())
    model = convert(dense, share=share)
    expected = (4, 2) if share is None else (2, 2)
    assert (model.config.shared_heads, model.config.active_heads) == expected
    with pytest.raises(ValueError, match="shared_heads must be given with active_heads for a diffusion model"):
        convert(dense, active_heads=3)


def test_a_classifier_of_timm_is_converted_at_a_share() -> None:
    timm = pytest.importorskip("timm")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    model = convert(dense.eval(), share=0.5, calibration=torch.randn(4, 3, 8, 8), progress=False)
    assert [(c.num_shared, c.active_heads) for c in (b.attn.router.config for b in model.blocks)] == [(1, 1)] * 2


@pytest.mark.parametrize("task", ["language", "image_classification"])
@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        ("{}", None),
        ("{share: 0.5}", None),
        ("{active_heads: 3}", None),
        ("{share: 0.5, active_heads: 3}", "conversion.share must be left out where"),
        ("{share: 2}", "conversion.share must be a number above 0"),
        ("{shared_heads: 2}", "conversion.active_heads must be given with shared_heads = 2"),
    ],
)
def test_recipes_take_a_share_too(task, conversion, message) -> None:
    options = {"task": task, "conversion": conversion, "training": "{output_dir: out, max_steps: 1}"}
    options["model"] = "{path: base}" if task == "language" else "{name: vit_tiny_patch16_224, pretrained: true}"
    if task == "image_classification":
        options["data"] = "{dataset: fashion-mnist}"
    overrides = [part for name, value in options.items() for part in (f"--{name}", value)]
    if message is None:
        load_recipe(None, overrides)
    else:
        with pytest.raises(ValueError, match=message):
            load_recipe(None, overrides)


@pytest.mark.parametrize("options", [dict(router="fixed"), dict(layers="drop"), dict(layers="mix")], ids=str)
def test_fixed_heads_and_dropped_layers_take_a_share(make_dense, tokens, options) -> None:
    model = convert(make_dense(), share=0.5, calibration=tokens, progress=False, **options)
    assert sum(c.num_shared + c.active_heads for c in model.config.layer_configs()) == 4  # of 2 layers of 4 heads
