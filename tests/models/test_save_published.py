"""Promises of `save_published`: published -> ours -> published gives the same tensors, read by name, sizes or file alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("timm", reason="the vision extra is not installed")
pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from moh.models.published import load_published, save_published
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.models.transformers.published import REPOSITORY, is_published_llama

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"transnext_a": "model", "transnext_b": "model", "dit_a": "ema", "dit_b": "ema"}
"""Golden model -> the key of its tensors in a published file."""
LAYOUTS = ("moh_transnext_base_75", "moh_transnext_base_50", "moh_transnext_small_75", "moh_transnext_small_80")
LLAMA = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=64, router="query_norm", shared_heads=4, active_heads=2,
)  # fmt: skip


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and published tensors."""
    file = GOLDEN / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    tensors = load_file(file)
    return config, {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", FILES)
def test_a_file_goes_there_and_back(name: str, tmp_path: Path) -> None:
    config, state = golden(name)
    model = load_published(state, config)
    file = tmp_path / "new" / "model.pt"
    save_published(model, file)
    written = torch.load(file, weights_only=True)
    assert written.keys() == {FILES[name], "args"}
    assert_same(written[FILES[name]], state)
    for key in ("shared_head", "routed_head", "num_classes", "embed_dims", "depth", "hidden_size", "mlp_ratios"):
        assert written["args"].get(key) == config.get(key)
    again = load_published(file)  # the configuration is the file's own
    assert type(again) is type(model)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert [p.name for p in file.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("name", ["transnext_b", "dit_b"])
@torch.no_grad()
def test_the_heads_that_are_set_now_are_saved(name: str, tmp_path: Path) -> None:
    import moh

    config, state = golden(name)
    model = load_published(state, config)
    moh.set_active_heads(model, 1)
    save_published(model, tmp_path / "model.pt")
    with (
        moh.record_routing(model) as before,
        moh.record_routing(again := load_published(tmp_path / "model.pt")) as after,
    ):
        for each in (model, again):
            image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            each(image) if "transnext" in name else each(
                image[:, :1, :8, :8].repeat(1, 4, 1, 1), torch.ones(1), torch.ones(1).long()
            )
    assert before.share() == after.share()


@pytest.mark.parametrize("name", ["dit_a", "dit_b"])
def test_the_size_of_a_head_is_where_the_published_code_reads_it(name: str, tmp_path: Path) -> None:
    """It takes `head_dim` only where `num_heads` is a list."""
    config, state = golden(name)
    save_published(load_published(state, config), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt")["args"]
    heads = saved["num_heads"]
    assert isinstance(heads, list) or heads * saved["head_dim"] == saved["hidden_size"]
    assert heads == config["num_heads"]


@pytest.mark.parametrize("share", [90, 75])
def test_a_published_diffusion_model_is_known_by_its_name(share: int, tmp_path: Path, monkeypatch) -> None:
    from moh.models.diffusers import create_dit
    from moh.models.diffusers.published import name_of, published_config, published_state

    for size in ("xl", "l", "b", "s"):
        with torch.device("meta"):
            model = create_dit(f"moh_dit_{size}_2_{share}")
        name = f"MoH-DiT-{size.upper()}/2-{share}"
        assert name_of(published_config(model), published_state(model)) == name
        with torch.device("meta"):
            other = create_dit(f"moh_dit_{size}_2_{share}", in_channels=3)
        assert name_of(published_config(other), published_state(other)) is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_classifier_is_known_by_its_name(name: str) -> None:
    import timm

    from moh.models.timm.transnext.published import name_of, published_config

    with torch.device("meta"):
        model = timm.create_model(name, img_size=448, num_classes=10)
        other = timm.create_model(name, window_size=5)
    assert name_of(published_config(model)) == name
    assert name_of(published_config(other)) is None


@pytest.mark.parametrize(
    ("kept", "size"), [({}, 224), ({"input_size": 384, "pretrain_size": 224}, 224), ({"input_size": 256}, 256)], ids=str
)
def test_a_training_file_of_the_authors_states_its_name(
    kept: dict[str, int], size: int, tmp_path: Path, monkeypatch
) -> None:
    from moh.models.timm.transnext import published

    made: dict[str, Any] = {}
    monkeypatch.setattr(published, "load", lambda state, config, dtype: made.update(config))
    state = {"patch_embed1.proj.weight": torch.zeros(1), "head.weight": torch.zeros(7, 1)}
    arguments = argparse.Namespace(model="moh_transnext_small_80", **kept)
    torch.save({"model": state, "args": arguments}, tmp_path / "checkpoint_3.pth")
    load_published(tmp_path / "checkpoint_3.pth")
    assert (made["img_size"], made["num_classes"], made["shared_head"]) == (size, 7, (3, 6, 3, 8))
    torch.save(state, tmp_path / "moh_transnext_base_50.pth")  # by the name that the authors gave the file
    load_published(tmp_path / "moh_transnext_base_50.pth")
    assert made["routed_head"] == (2, 4, 6, 8)
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(
        ValueError, match=r"neither the arguments in .*mine\.pth nor its name state a published model; one"
    ):
        load_published(tmp_path / "mine.pth")


def test_a_language_model_goes_there_and_back(tmp_path: Path) -> None:
    config, state = golden("llama_a")
    model = load_published(state, config)
    save_published(model, tmp_path / "saved")
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), state)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = {"model", "router", "shared_heads", "routed_active", "rope"}
    assert {key: written[key] for key in config.keys() - ours} == {key: config[key] for key in config.keys() - ours}
    assert written["auto_map"] == {"AutoModelForCausalLM": f"{REPOSITORY}--modeling_llama.LlamaForCausalLM"}
    assert is_published_llama(written, tmp_path / "saved") and written["rope_scaling"] is None
    again = load_published(tmp_path / "saved")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert again.config.layer_configs() == model.config.layer_configs()


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}], ids=str
)
@torch.no_grad()
def test_what_a_llama_may_have_survives(rope: dict[str, Any], tmp_path: Path) -> None:
    options = dict(hidden_act="gelu", attention_bias=True, eos_token_id=5, tie_word_embeddings=True)
    config = MoHLlamaConfig(**LLAMA | options, rope_parameters={"rope_theta": 5e5, **rope})
    model = MoHLlamaForCausalLM(config).eval()
    save_published(model, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["rope_scaling"] == {"type": rope["rope_type"], "factor": rope["factor"]}
    assert (written["torch_dtype"], written["rope_theta"]) == ("float32", 5e5)
    again = load_published(tmp_path / "saved")
    assert (again.config.eos_token_id, again.config.hidden_act, again.dtype) == (5, "gelu", torch.float32)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    save_published(model.half(), tmp_path / "half")
    assert load_published(tmp_path / "half").dtype is torch.float16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router": "linear"}, "layer 0 must have router 'query_norm' or 'query_norm_rounded', got 'linear'"),
        ({"routing_unit": "kv_group"}, "layer 0 must choose single heads, got routing_unit='kv_group'"),
        ({"shared_heads": [0, 1, 2, 5]}, "layer 0 must share its first heads, got"),
        ({"active_heads": [2, 3]}, "layer 1 must have 4 shared and 2 active of its 8 heads, .* got 4 and 3"),
        ({"active_heads": 0}, "layer 0 must activate routed heads or share all 8, got 4 shared"),
        ({"head_dim": 4}, "head_dim must be 8, got 4"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}, "rope_type must be 'default' or .* got 'llama3'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_language_model_that_the_published_code_cannot_express_is_refused(
    changed, message: str, tmp_path: Path
) -> None:
    shared = changed.get("shared_heads")
    changed = {**changed, "shared_heads": [shared] * 2} if isinstance(shared, list) else changed
    model = MoHLlamaForCausalLM(MoHLlamaConfig(**LLAMA | changed))
    with pytest.raises(ValueError, match=message):
        save_published(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def refused_models() -> list[Any]:
    from dit_cases import tiny_model as dit
    from transnext_cases import tiny_model as transnext

    return [
        pytest.param(
            lambda: torch.nn.Linear(2, 2), "model must be a MoHLlamaForCausalLM, .*, got Linear", id="another"
        ),
        pytest.param(lambda: transnext(dense=True), "it is dense", id="dense"),
        pytest.param(lambda: transnext(global_pool=""), "global_pool must be 'avg', got ''", id="pool"),
        pytest.param(
            lambda: transnext(shared_heads=((1,), (0,), (0,)), active_heads=(1, 1, 1)), "first heads", id="shared"
        ),
        pytest.param(lambda: dit(), "layer 1 must not have just one shared head", id="one_shared"),
        pytest.param(
            lambda: dit(shared_heads=2, active_heads=1, router="single_stage"), "'two_stage', got", id="router"
        ),
        pytest.param(
            lambda: dit(shared_heads=2, active_heads=1, freq_shift=1), "freq_shift must be 0, got 1", id="times"
        ),
        pytest.param(lambda: dit(shared_heads=2, active_heads=1, norm_eps=1e-5), "norm_eps must be 1e-06", id="norms"),
    ]


@pytest.mark.parametrize(("make", "message"), refused_models())
def test_others_are_refused_and_leave_no_file(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_published(make(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_stages_have_one_number_of_active_heads(tmp_path: Path) -> None:
    import dataclasses

    from transnext_cases import tiny_model as transnext

    model = transnext(depths=(1, 2, 1))
    router = model.stages[1].blocks[1].attn.router
    router.config = dataclasses.replace(router.config, active_heads=2)
    with pytest.raises(ValueError, match=r"all layers of stage 1 must have the same active_heads, got \[1, 2\]"):
        save_published(model, tmp_path / "model.pt")


def test_a_directory_is_not_replaced_by_a_file_nor_files_by_a_directory(tmp_path: Path) -> None:
    config, state = golden("dit_b")
    with pytest.raises(ValueError, match="path must be a file for this model"):
        save_published(load_published(state, config), tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"it holds other files, which are kept, such as thesis\.tex"):
        save_published(MoHLlamaForCausalLM(MoHLlamaConfig(**LLAMA)), tmp_path)


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch) -> None:
    config, state = golden("dit_b")
    model = load_published(state, config)
    file = tmp_path / "model.pt"
    file.write_bytes(b"earlier")

    def broken(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_published(model, file)
    assert file.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1
