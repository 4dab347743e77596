"""The dial: `moh.set_active_heads` on models of every family, alone, compiled, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moh
from moh.models.dial import moh_routers

IMAGE = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)


def llama(**options: Any) -> Any:
    from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    heads = dict(router="linear", shared_heads=1, active_heads=1)
    return MoHLlamaForCausalLM(MoHLlamaConfig(**sizes | heads | options)).eval()


def transformers_vit() -> Any:
    from moh.models.transformers import MoHViTConfig, MoHViTForImageClassification

    config = MoHViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=5,
        shared_heads=1,
        active_heads=1,
    )
    return MoHViTForImageClassification(config).eval()


def timm_vit() -> Any:
    import timm

    return timm.create_model("moh_vit", base="vit_tiny_patch16_224", shared_heads=1, active_heads=1, **IMAGE).eval()


def dit() -> Any:
    from moh.models.diffusers import MoHDiTTransformer2DModel

    model = MoHDiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        sample_size=8,
        num_classes=5,
        shared_heads=1,
        active_heads=1,
    ).eval()
    with torch.no_grad():  # a new one gives 0
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def transnext() -> Any:
    from moh.models.timm.transnext import MoHTransNeXt

    sizes = dict(embed_dims=(24, 48), num_heads=(2, 4), depths=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
    return MoHTransNeXt(img_size=32, num_classes=5, shared_heads=(2, 1), active_heads=(0, 1), **sizes).eval()


def layers_of_its_own() -> Any:
    return nn.Sequential(*(moh.MoHAttention(32, 4, shared_heads=1, active_heads=1) for _ in range(3))).eval()


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "transformers_vit": transformers_vit,
    "timm_vit": timm_vit,
    "dit": dit,
    "transnext": transnext,
    "layers": layers_of_its_own,
}


@torch.no_grad()
def run(family: str, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if family == "llama":
        return model(torch.randint(64, (2, 10), generator=generator)).logits
    if family == "dit":
        x = torch.randn(2, 4, 8, 8, generator=generator)
        return model(x, torch.tensor([3, 700]), torch.tensor([0, 4])).sample
    if family == "layers":
        return model(torch.randn(2, 6, 32, generator=generator))
    images = torch.randn(2, 3, *((32, 32) if family == "transnext" else (16, 16)), generator=generator)
    return model(images).logits if family == "transformers_vit" else model(images)


def counts(model: nn.Module) -> list[int]:
    return [r.config.active_heads for r in moh_routers(model)]


def recorded_share(family: str, model: nn.Module) -> float:
    with moh.record_routing(model) as routing:
        run(family, model)
    return routing.share()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_use_as_many_heads_as_the_dial_says(family: str) -> None:
    model = FAMILIES[family]()
    before = run(family, model)
    for k in (3, 2, 1):
        moh.set_active_heads(model, k)
        with moh.record_routing(model) as routing:
            run(family, model)
        for _, info in routing:
            wanted = info.config.num_shared + (k if info.config.num_routed else 0)
            assert bool((info.active.sum(-1) == wanted).all())
    assert torch.equal(run(family, model), before), "k = 1 is what the model had: the same output again"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_turned_to_k_is_the_model_made_with_k(family: str) -> None:
    model = FAMILIES[family]()
    moh.set_active_heads(model, 3)
    turned = run(family, model)
    moh.set_active_heads(model, 1)
    assert not torch.equal(run(family, model), turned)
    for router in moh_routers(model):  # by definition, gates of the scaled two-stage router hold a factor k
        fresh = moh.routing.build_router(moh.MoHConfig(4, 1, 3, router.config.router), 32)
        if router.config.num_heads != 4 or sum(p.numel() for p in fresh.parameters()) != sum(
            p.numel() for p in router.parameters()
        ):
            continue
        fresh.load_state_dict(router.state_dict())
        x = torch.randn(2, 5, 32)
        moh.set_active_heads(model, 3)
        torch.testing.assert_close(router(x).gates, fresh(x).gates, rtol=0, atol=0)
        break
    else:
        assert family == "transnext"  # its own widths


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "transnext"])
@pytest.mark.parametrize(
    ("k", "expected", "share"),
    [(2, [2, 2, 2], 0.75), ([3, 1, 2], [3, 1, 2], 0.75), (0.75, [2, 2, 2], 0.75), (1.0, [3, 3, 3], 1.0)],
    ids=["number", "list", "share", "all"],
)
def test_every_form_of_k_sets_the_layers_and_returns_the_share(
    family: str, k: Any, expected: list[int], share: float
) -> None:
    model = FAMILIES[family]()
    got = model.set_active_heads(k) if hasattr(model, "set_active_heads") else moh.set_active_heads(model, k)
    assert got == pytest.approx(share)
    assert counts(model) == expected
    assert recorded_share(family, model) == pytest.approx(share)


def test_transformers_and_diffusers_models_have_the_dial_as_a_method() -> None:
    for family in ("llama", "transformers_vit", "dit"):
        assert FAMILIES[family]().set_active_heads(2) == 0.75


def test_a_share_is_spread_over_the_layers_as_evenly_as_whole_heads_allow() -> None:
    model = llama(num_hidden_layers=8)
    assert moh.set_active_heads(model, 20 / 32) == 20 / 32
    assert sorted(counts(model)) == [1] * 4 + [2] * 4
    assert counts(model) in ([1, 2] * 4, [2, 1] * 4)


def test_a_share_respects_layers_with_other_shared_heads() -> None:
    model = llama(shared_heads=[[0, 2, 3], 1, 1], active_heads=1)
    assert moh.set_active_heads(model, 0.5) == 0.5
    assert [r.config.num_shared + r.config.active_heads for r in moh_routers(model)] in ([3, 2, 1], [3, 1, 2])
    assert [r.config.shared_indices for r in moh_routers(model)] == [(0, 2, 3), (0,), (0,)]


def test_a_share_follows_the_costs_that_the_conversion_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama()
    needs = [[9.0, 1.0, 0.5, 0.25, 0.0], [9.0, 8.0, 7.0, 3.0, 0.0], [9.0, 0.1, 0.05, 0.01, 0.0]]
    model.config.head_costs = needs
    assert moh.set_active_heads(model, 0.5) == 0.5
    assert counts(model) == [0, 3, 0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert counts(loaded) == [0, 3, 0]
    assert loaded.config.head_costs == needs
    assert moh.set_active_heads(loaded, 8 / 12) == 8 / 12
    assert counts(loaded) == [2, 3, 0]


def test_the_dial_is_saved_with_a_model_whose_configuration_left_shared_heads_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(shared_heads=None, active_heads=2, router="query_norm")  # None: the other two heads are shared
    model.set_active_heads(1)
    expected = run("llama", model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.active_heads == 1
    assert loaded.config.share == 0.75
    assert torch.equal(run("llama", loaded), expected)


@pytest.mark.parametrize("k", [3, [2, 1, 3], 0.6], ids=["number", "list", "share"])
@pytest.mark.parametrize("family", ["llama", "transformers_vit", "timm_vit", "dit"])
def test_a_saved_model_comes_back_at_the_same_share(family: str, k: Any, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    share = moh.set_active_heads(model, k)
    expected = run(family, model)
    loaded: Any
    if family == "timm_vit":
        from moh.models.timm import from_pretrained, save_pretrained

        save_pretrained(model, tmp_path)
        loaded = from_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert counts(loaded) == counts(model)
    assert recorded_share(family, loaded) == pytest.approx(share)
    torch.testing.assert_close(run(family, loaded), expected, rtol=1e-5, atol=1e-6)


def test_transnext_keeps_a_setting_that_is_given_to_timm_as_an_argument(tmp_path: Path) -> None:
    import timm

    from moh.models.timm.loading import load_image_classifier, save_image_classifier

    sizes = dict(img_size=32, num_classes=5, embed_dims=(24, 48), num_heads=(2, 4), depths=(1, 2), mlp_ratios=(2, 2))
    sizes |= dict(sr_ratios=(2, 1), shared_heads=(2, 1), active_heads=(0, 1))
    model = timm.create_model("moh_transnext_micro32_50", **sizes).eval()
    moh.set_active_heads(model, [0, 3, 3])
    save_image_classifier(model, tmp_path / "as made", model_args=sizes)
    save_image_classifier(model, tmp_path / "as set", model_args=sizes | {"active_heads": (0, 3)})
    assert counts(load_image_classifier(tmp_path / "as made")) == [0, 1, 1]
    loaded = load_image_classifier(tmp_path / "as set")
    assert counts(loaded) == [0, 3, 3]
    torch.testing.assert_close(run("transnext", loaded), run("transnext", model), rtol=1e-5, atol=1e-6)


def test_a_model_of_diffusers_writes_its_setting_into_its_configuration_alone(tmp_path: Path) -> None:
    model = dit()
    model.set_active_heads([3, 1, 2])
    model.save_config(tmp_path)
    again = type(model).from_config(type(model).load_config(tmp_path))
    assert counts(again) == [3, 1, 2]
    assert again.share == model.share == 0.75


def test_models_beside_each_other_keep_configurations_of_their_own() -> None:
    """For example a student and its teacher, or an image model and a text model."""
    from moh.models.diffusers import MoHDiTTransformer2DModel

    text, images, drawing = llama(), transformers_vit(), dit()
    teacher = MoHDiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8)
    text.config.head_costs = [[9.0, 1.0, 0.5, 0.25, 0.0]] * 3
    both = nn.ModuleList([text, images, drawing, teacher])
    assert moh.set_active_heads(both, [3, 3, 3, 1, 2, 3, 2, 2, 2]) == 30 / 36
    assert text.config.active_heads == 3
    assert images.config.active_heads == [1, 2, 3]
    assert drawing.config.active_heads == 2
    assert teacher.config.active_heads is None
    with moh.active_heads(both, 1.0):  # no single model: the costs of one don't apply to the others
        assert counts(both) == [3] * 9
    assert images.config.active_heads == [1, 2, 3]


def test_a_part_of_a_model_is_refused_because_its_configuration_describes_all() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"model must be whole, .* 3 layers, got 1 routers"):
        moh.set_active_heads(model.model.layers[1], 2)
    assert counts(model) == [1, 1, 1] and model.config.active_heads == 1


def test_generation_with_the_cache_follows_the_dial() -> None:
    model = llama()
    prompt = torch.randint(64, (2, 5))
    outputs = []
    for k in (0, 1, 3):
        model.set_active_heads(k)
        options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
        cached = model.generate(prompt, use_cache=True, **options)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
        logits = model(cached).logits
        outputs.append(logits)
    assert not torch.equal(outputs[0][:, :5], outputs[2][:, :5])


def test_the_dial_may_be_turned_between_two_tokens() -> None:
    """The cache holds keys and values of all heads, which do not depend on k of their own layer."""
    from transformers import DynamicCache

    model = llama(num_hidden_layers=1)
    ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache)
        model.set_active_heads(3)
        after = model(ids[:, 8:], past_key_values=cache).logits[:, -1]
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_follows_the_dial() -> None:
    torch.compiler.reset()
    layer = moh.MoHAttention(32, 4, shared_heads=1, active_heads=1, router="linear").eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        for k in (1, 3, 2, 0, 1):
            moh.set_active_heads(compiled, k)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_wrapped_models_follow_the_dial() -> None:
    model = llama()
    wrapper = nn.DataParallel(model)
    assert moh.set_active_heads(wrapper, 3) == 1.0
    assert model.config.active_heads == 3
    assert model.model.config.active_heads == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_manager_restores_what_was_before(family: str) -> None:
    model = FAMILIES[family]()
    before, expected = counts(model), run(family, model)
    with pytest.raises(RuntimeError, match="inside"), moh.active_heads(model, 1.0) as share:
        assert share == 1.0
        assert not torch.equal(run(family, model), expected)
        raise RuntimeError("inside")
    assert counts(model) == before
    assert torch.equal(run(family, model), expected)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (4, r"layer 0: active_heads must be between 0 and num_heads - shared_heads = 3, got 4"),
        (-1, r"layer 0: active_heads must be between 0 and .* got -1"),
        ([1, 2], r"one entry per MoH layer \(3\), got 2 entries"),
        ([1, 2, 7], r"layer 2: active_heads must be between 0 and .* got 7"),
        (0.0, r"above 0 and at most 1, got 0.0"),
        (1.5, r"above 0 and at most 1, got 1.5"),
        (float("nan"), r"above 0 and at most 1, got nan"),
        (0.1, r"between 0.250 and 1.000 for this model, whose shared heads are always active, got 0.1"),
        (True, r"an int, a list of ints .* or a float share .* got True"),
        ("2", r"an int, a list of ints .* got '2'"),
        ([1.0, 2.0, 2.0], r"an int, a list of ints"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_changes(k: Any, message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        model.set_active_heads(k)
    assert counts(model) == [1, 1, 1]
    assert model.config.active_heads == 1


def test_a_model_without_routing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer whose heads are routed: a Linear .* moh.convert"):
        moh.set_active_heads(nn.Linear(3, 3), 1)


def test_a_learned_router_is_not_set_to_what_its_weights_cannot_serve() -> None:
    scoring = nn.Sequential(moh.MoHAttention(32, 4, shared_heads=1, active_heads=1))
    with pytest.raises(ValueError, match="layer 0: active_heads must be from 1 to 3 with this layer's learned router"):
        moh.set_active_heads(scoring, 0)
    without_scores = nn.Sequential(moh.MoHAttention(32, 4, shared_heads=1, active_heads=0))
    with pytest.raises(ValueError, match="layer 0: active_heads must be 0 with this layer's learned router"):
        moh.set_active_heads(without_scores, 2)
