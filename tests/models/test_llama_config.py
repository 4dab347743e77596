"""Promises of `MoHLlamaConfig`: heads per layer, clear errors, and a round trip through `config.json`."""

from __future__ import annotations

import pytest

from moh import MoHConfig
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM


@pytest.mark.parametrize(
    "shared, active, expected",
    [
        pytest.param(1, 2, [(1, 2), (1, 2)], id="the-same-in-every-layer"),
        pytest.param([1, [0, 3]], [3, 1], [(1, 3), ([0, 3], 1)], id="a-number-and-indices"),
        pytest.param(None, [1, 0], [(3, 1), (4, 0)], id="none-shares-the-rest"),
        pytest.param(2, [1, 2], [(2, 1), (2, 2)], id="only-active-differs"),
    ],
)
def test_each_layer_has_its_heads(tiny_config, shared, active, expected):
    config = tiny_config(shared_heads=shared, active_heads=active, router="linear")
    layers = [MoHConfig(4, s, a, "linear") for s, a in expected]
    assert config.layer_configs() == layers
    assert config.share == pytest.approx(sum(layer.share for layer in layers) / 2)
    model = MoHLlamaForCausalLM(config)
    assert [layer.self_attn.router.config for layer in model.model.layers] == layers


def test_all_heads_are_shared_by_default(tiny_config):
    assert tiny_config(shared_heads=None, active_heads=0).share == 1


def test_round_trip_through_json(tiny_config, tmp_path):
    config = tiny_config(
        shared_heads=[2, [0, 3]],
        active_heads=[1, 2],
        router="linear",
        router_aux_loss_coef=0.01,
        attention_bias=True,
    )
    config.save_pretrained(tmp_path)
    loaded = MoHLlamaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.layer_configs() == config.layer_configs()


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(dict(shared_heads=3), "layer 0: active_heads must be between 0 and .* = 1, got 2", id="too-many"),
        pytest.param(
            dict(shared_heads=[1, 3]), "layer 1: active_heads must be between 0 and .* = 1, got 2", id="layer-1"
        ),
        pytest.param(dict(shared_heads=[1, [0, 4]]), r"layer 1: shared_heads must hold indices .*\[0, 4\]", id="index"),
        pytest.param(dict(shared_heads=0, active_heads=0), "layer 0: active_heads must be at least 1", id="no-heads"),
        pytest.param(
            dict(active_heads=[1, 1, 1]),
            r"active_heads must be a number or a list with one entry per layer \(2\), got 3 entries",
            id="list-too-long",
        ),
        pytest.param(
            dict(shared_heads=[1]), r"shared_heads must be .* per layer \(2\), got 1 entries", id="list-short"
        ),
        pytest.param(dict(router="top_p"), "router must be one of .*got 'top_p'", id="router"),
        pytest.param(
            dict(num_key_value_heads=3),
            "num_attention_heads must be a multiple of num_key_value_heads = 3, got 4",
            id="kv",
        ),
        pytest.param(dict(router_aux_loss_coef=-0.1), "router_aux_loss_coef must be at least 0, got -0.1", id="coef"),
    ],
)
def test_heads_that_do_not_add_up_are_refused(tiny_config, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_an_unknown_backend_is_refused(tiny_model):
    with pytest.raises(ValueError, match='"moh_fastest"` is not supported'):
        tiny_model(attn_implementation="moh_fastest")


def test_the_field_of_early_versions_names_its_successor(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="moh_backend is now attn_implementation='moh_sdpa', got 'sdpa'"):
        tiny_config(moh_backend="sdpa")
    assert not hasattr(tiny_config(moh_backend=None), "moh_backend")
