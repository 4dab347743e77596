"""Promises of the vision transformers registered with timm: shares, timm's conventions, export and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import moh
from moh.models.timm import MoHViTAttention, replace_attention
from moh.models.timm.vit_presets import preset_heads
from moh.routing import Router

SIZES = [f"moh_vit_{size}_patch16_224_{percent}" for size in ("tiny", "small", "base") for percent in (50, 75, 90)]
MICRO = [f"moh_vit_micro_patch4_{side}_{kind}" for side in (28, 32) for kind in ("dense", 50, 75, 90)]


def tiny(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model("moh_vit_micro_patch4_28_50", **dict(depth=2, embed_dim=40, num_heads=5) | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def configs(model: nn.Module) -> list[moh.MoHConfig]:
    return [module.config for module in model.modules() if isinstance(module, Router)]


def test_all_sizes_are_registered() -> None:
    assert {*SIZES, *MICRO, "moh_vit"} == set(timm.list_models("moh_vit*"))


def test_the_package_can_be_imported_before_timm(forks) -> None:
    code = "import moh.models.timm, timm\nassert timm.is_model('moh_vit_base_patch16_224_50'), timm.list_models('moh*')"
    result = forks.run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_timms_with_routers_and_uses_the_share_in_its_name(name) -> None:
    dense_name = name.removeprefix("moh_").rpartition("_")[0]
    with torch.device("meta"):
        model, dense = timm.create_model(name), timm.create_model(dense_name)
    layers = configs(model)
    used = sum(c.num_shared + c.active_heads for c in layers) / sum(c.num_heads for c in layers)
    assert used == pytest.approx(int(name[-2:]) / 100, abs=0.012)
    assert all(c.active_heads for c in layers)  # a layer without active routed heads could never use the others
    own = {name: p.shape for name, p in model.state_dict().items() if ".router." not in name}
    assert own == {name: p.shape for name, p in dense.state_dict().items()}
    assert type(model) is VisionTransformer
    assert model.default_cfg["input_size"] == (3, 224, 224) and model.default_cfg["architecture"] == name


@pytest.mark.parametrize("num_heads", [3, 6, 10, 12])
@pytest.mark.parametrize("percent", [50, 75, 90])
def test_a_share_is_spread_evenly_over_the_layers(percent, num_heads) -> None:
    shared, active = preset_heads(percent, num_heads, 12)
    assert max(active) - min(active) <= 1 and shared == num_heads // 4
    assert sum(shared + k for k in active) == round(percent * num_heads * 12 / 100)


@pytest.mark.parametrize("name", MICRO)
def test_small_sizes_train_a_step_and_use_their_share_of_heads(name) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, drop_path_rate=0.1)
    side = int(name.split("_")[4])
    with moh.record_routing(model) as routing:
        logits = model(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 10)
    assert 470_000 < sum(p.numel() for p in model.parameters()) < 490_000
    logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    if name.endswith("dense"):
        assert len(routing) == 0
        assert all(type(block.attn) is Attention for block in model.blocks)
    else:
        assert routing.share() == pytest.approx(int(name[-2:]) / 100, abs=1e-6)


def test_heads_can_be_chosen_for_all_layers_and_for_each() -> None:
    model = tiny(shared_heads=1, active_heads=[2, 4], router="linear")
    assert [(c.num_shared, c.active_heads, c.router) for c in configs(model)] == [(1, 2, "linear"), (1, 4, "linear")]
    model = tiny(shared_heads=[[0, 3], 1], active_heads=[1, 2])
    assert [c.shared_indices for c in configs(model)] == [(0, 3), (0,)]
    model = tiny(num_heads=10, shared_heads=0)  # the share stays
    assert [(c.num_shared, c.active_heads) for c in configs(model)] == [(0, 5), (0, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(active_heads=5), r"layer 0: active_heads must be between 0 and num_heads - shared_heads = 4, got 5"),
        (dict(active_heads=[1]), r"active_heads must be a number or a list with one entry per layer \(2\)"),
        (dict(shared_heads=[1, 1]), r"active_heads must be given too where shared_heads is a list"),
        (dict(router="nonsense"), r"router must be one of 'two_stage'"),
        (dict(backend="nonsense"), r"backend must be None or one of"),
    ],
    ids=["too-many", "layers", "shared-alone", "router", "backend"],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)(images())


@pytest.mark.parametrize(
    ("base", "classes"),
    [("vit_tiny_patch16_224", 1000), ("deit_tiny_distilled_patch16_224", 1000), ("deit3_small_patch16_224", 1000)],
)
def test_any_vision_transformer_of_timm_can_be_the_base(base, classes) -> None:
    with torch.device("meta"):
        model = timm.create_model("moh_vit", base=base, shared_heads=1, active_heads=1)
        dense = timm.create_model(base)
    assert type(model) is type(dense) and model.num_classes == classes
    assert len([m for m in model.modules() if isinstance(m, MoHViTAttention)]) == 12
    assert model.pretrained_cfg["mean"] == dense.pretrained_cfg["mean"]
    assert not model.pretrained_cfg.get("hf_hub_id") and not model.pretrained_cfg["url"]


def test_a_base_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a timm VisionTransformer.*got ResNet"):
        timm.create_model("moh_vit", base="resnet18", shared_heads=1, active_heads=1)
    with pytest.raises(ValueError, match="shared_heads and active_heads must be given"):
        timm.create_model("moh_vit", base="vit_tiny_patch16_224", active_heads=1)


def test_as_many_layers_as_the_model_has_are_asked_for() -> None:
    dense = timm.create_model("moh_vit_micro_patch4_28_dense", depth=2)
    with pytest.raises(ValueError, match=r"one entry per attention layer \(2\), got 1"):
        replace_attention(dense, [moh.MoHConfig(10, 1, 2)])
    assert all(type(block.attn) is Attention for block in dense.blocks)


@torch.no_grad()
def test_features_and_intermediates_are_the_blocks_outputs() -> None:
    model, x = tiny(), images()
    last, everything = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert [tuple(f.shape) for f in everything] == [(2, 40, 7, 7)] * 2
    features = timm.create_model(
        "moh_vit_micro_patch4_28_50", depth=2, embed_dim=40, num_heads=5, features_only=True, out_indices=(0,)
    ).eval()
    missing = features.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert torch.equal(features(x)[0], everything[0])
    assert features.feature_info.channels() == [40]


@torch.no_grad()
def test_classifier_can_be_replaced_or_left_out() -> None:
    model, x = tiny(), images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.allclose(model(x), pooled)


def test_weight_decay_and_layer_rates_reach_the_routers() -> None:
    model = tiny(class_token=True, global_pool="token")
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {name for name in names.values() if ".router." in name} <= decayed
    assert not decayed & {"pos_embed", "cls_token"}
    rates = [group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert min(rates) < max(rates) == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_checkpointing_changes_no_number(training) -> None:
    results = []
    for enable in (False, True):
        model = tiny().train(training)
        model.set_grad_checkpointing(enable)
        with moh.record_routing(model) as routing:
            loss = model(images()).square().mean() + 0.01 * routing.balance_loss()
        loss.backward()
        assert len(routing) == 2
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


@torch.no_grad()
def test_drop_path_acts_in_training_only() -> None:
    model = tiny(drop_path_rate=0.5)
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images(16)), model(images(16)))


@torch.no_grad()
def test_another_image_size_works_where_the_model_allows_it() -> None:
    model = tiny(dynamic_img_size=True)
    assert model(torch.randn(1, 3, 36, 20)).shape == (1, 10)
    with pytest.raises(AssertionError, match="Input height"):
        tiny()(torch.randn(1, 3, 36, 36))


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@torch.no_grad()
def test_exported_model_gives_the_same_for_any_batch(router) -> None:
    model = tiny(router=router)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 5):
        torch.testing.assert_close(exported(images(count)), model(images(count)))


@pytest.mark.parametrize("router", ["two_stage", "linear"])
def test_compiled_model_is_one_graph_and_trains_as_the_eager_one(router) -> None:
    torch.compiler.reset()
    model = tiny(router=router).train()
    # torch 2.11 breaks a graph that is recorded from outside at each router (moh.routing.recording)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=torch.__version__ >= (2, 12))
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        with moh.record_routing(model) as routing:
            loss = run(images()).square().mean() + 0.01 * routing.balance_loss()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
