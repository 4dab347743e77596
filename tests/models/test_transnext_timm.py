"""Promises of timm's conventions: creating, features, classifiers, parameter groups, saving, gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from transnext_cases import tiny_model

import moh
from moh.models.timm.transnext.published import published_names

NAMES = timm.list_models("moh_transnext_*")
MICRO = [name for name in NAMES if "micro" in name]


def test_all_sizes_are_registered_under_names_of_their_own():
    published = {f"moh_transnext_{size}" for size in ("small_75", "small_80", "base_75", "base_50")}
    dense = {f"moh_transnext_{size}_dense" for size in ("small", "base", "micro32", "micro64")}
    assert published | dense <= set(NAMES)
    assert len(MICRO) == 8


ORDERS = ["import moh, timm", "import timm, moh", "from moh.models.timm.transnext import MoHTransNeXt; import timm"]


@pytest.mark.parametrize("order", ORDERS)
def test_either_import_order_registers(forks, order):
    result = forks.run(f"{order}\nassert timm.is_model('moh_transnext_base_75')")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MICRO)
def test_small_sizes_train_a_step_and_use_their_share_of_heads(name):
    model = timm.create_model(name, num_classes=3, in_chans=1, drop_path_rate=0.1)
    size = model.pretrained_cfg["input_size"][1]
    with moh.record_routing(model) as routing:
        logits = model(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    if name.endswith("dense"):
        assert len(routing) == 0
    else:
        assert routing.share() == pytest.approx(int(name[-2:]) / 100, abs=0.01)


@pytest.mark.parametrize(
    ("name", "share"),
    [("small_80", 0.80), ("small_75", 0.75), ("base_75", 0.75), ("base_50", 0.5)],
    ids=["small_80", "small_75", "base_75", "base_50"],
)
def test_published_sizes_use_the_share_in_their_name(name, share):
    with torch.device("meta"):
        model = timm.create_model(f"moh_transnext_{name}")
    routers = [m.config for m in model.modules() if isinstance(m, moh.routing.Router)]
    used = sum(c.num_shared + c.active_heads for c in routers)
    assert used / sum(c.num_heads for c in routers) == pytest.approx(share, abs=0.05)


@torch.no_grad()
def test_features_of_every_stage():
    model = timm.create_model("moh_transnext_micro32_50", features_only=True)
    assert model.feature_info.channels() == [32, 64, 128]
    assert model.feature_info.reduction() == [2, 4, 8]
    shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 32, 32))]
    assert shapes == [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4)]


@torch.no_grad()
def test_chosen_intermediates_are_the_stages_outputs():
    model, x = tiny_model(), torch.randn(2, 3, 32, 32)
    last, everything = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and torch.equal(everything[-1], last)
    chosen = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert len(chosen) == 2 and all(map(torch.equal, chosen, everything))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_pruned_model_ends_with_the_stage_that_was_asked_for():
    model, x = tiny_model(), torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert torch.equal(model(x), expected)
    assert model.num_features == 16


@torch.no_grad()
def test_classifier_can_be_replaced_or_left_out():
    model, x = tiny_model(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.allclose(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4, 4, 4)  # logits of every token
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', ''"):
        model.reset_classifier(7, "max")


def test_state_dict_goes_round_and_holds_parameters_only(tmp_path):
    model, other = tiny_model(), tiny_model()
    for p in other.parameters():
        p.data.zero_()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)  # caches position biases, which must not be saved
        other(x)
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(other(x), expected)


def test_weight_decay_spares_positions_temperatures_and_embeddings():
    model = tiny_model()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    kinds = {name.split(".attn.")[-1] for name in decayed if ".attn." in name}
    assert kinds == {
        "q.weight",
        "kv.weight",
        "qkv.weight",
        "sr.weight",
        "proj.weight",
        "learnable_tokens",
        "learnable_bias",
        "router.shared.weight",
        "router.routed.weight",
        "router.stage.weight",
    }


def test_layer_groups_go_from_the_stem_to_the_head():
    model = tiny_model(depths=(1, 2, 1))
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + 2 + 4 + 1  # stem, patch embeddings, blocks, the rest
    assert all(name.startswith("stages.0.patch_embed") for name in groups[0])
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    rates = [group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert min(rates) < max(rates) == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_checkpointing_changes_no_number(training):
    x = torch.randn(2, 3, 32, 32)
    results = []
    for enable in (False, True):
        model = tiny_model().train(training)
        model.set_grad_checkpointing(enable)
        with moh.record_routing(model) as routing:
            loss = model(x).square().mean() + 0.01 * routing.balance_loss()
        loss.backward()
        assert len(routing) == 3
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_dropout_and_drop_path_act_in_training_only():
    options = dict(drop_rate=0.3, proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3)
    model, x = tiny_model(**options), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert torch.allclose(model(x), tiny_model()(x), atol=1e-6)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_what_the_published_optimiser_does_not_decay():
    with torch.device("meta"):
        model = timm.create_model("moh_transnext_micro32_75")
    theirs = published_names(model)
    keywords = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")  # anywhere in a published name
    kept = {name for name, published in theirs.items() if any(word in published for word in keywords)}
    assert model.no_weight_decay() == kept & {name for name, _ in model.named_parameters()}
    assert any(name.endswith("learnable_bias") for name in theirs) and kept
