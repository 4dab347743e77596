"""A published directory, which calls itself a Llama, loads as the MoH model that it is; a plain Llama stays one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moh.checkpoints
from moh.models.published import load_published
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.models.transformers.loading import load_causal_lm, load_config, load_tokenizer
from moh.models.transformers.published import (
    REPOSITORY,
    is_published_llama,
    published_heads,
    recognise_published_llama,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "llama_a.safetensors"
# would end the test if it were run; only its text may be read
CODE = "raise SystemExit('remote code was run')\nself.routed_head = 2\nself.shared_head = 4\n"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def published_config() -> dict[str, Any]:
    with safe_open(GOLDEN, "pt") as file:
        tiny = json.loads(file.metadata()["config"])
    for ours in ("model", "router", "shared_heads", "routed_active", "rope"):
        del tiny[ours]
    return tiny | {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.0",
        "use_cache": True,
    }


@pytest.fixture(params=["one_file", "shards", "bin_file", "bin_shards"])
def published(request: pytest.FixtureRequest, golden, published_config, tmp_path: Path) -> Path:
    state = {name.removeprefix("state."): t.clone() for name, t in golden.items() if name.startswith("state.")}
    (tmp_path / "config.json").write_text(json.dumps(published_config))
    (tmp_path / "modeling_llama.py").write_text(CODE)
    if request.param == "one_file":
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path
    if request.param == "bin_file":
        torch.save(state, tmp_path / "pytorch_model.bin")
        return tmp_path
    names = sorted(state)
    # The hub repository has 33 files pytorch_model-000NN-of-00033.bin and no safetensors
    stem, suffix, count = ("model", "safetensors", 2) if request.param == "shards" else ("pytorch_model", "bin", 5)
    shards = {f"{stem}-{i + 1:05}-of-{count:05}.{suffix}": names[i::count] for i in range(count)}
    for file, members in shards.items():
        part = {name: state[name] for name in members}
        torch.save(part, tmp_path / file) if suffix == "bin" else save_file(part, tmp_path / file, {"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    index_name = f"{stem}.{suffix}.index.json"
    (tmp_path / index_name).write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has asked for published models; undone after the test."""
    monkeypatch.setattr(AutoConfig, "from_pretrained", AutoConfig.__dict__["from_pretrained"])
    recognise_published_llama()


@pytest.fixture
def not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, whatever commands other tests have run in this one."""
    function = AutoConfig.from_pretrained.__func__
    while hasattr(function, "recognises_moh"):
        function = function.__wrapped__
    monkeypatch.setattr(AutoConfig, "from_pretrained", classmethod(function))


def with_auto_class(path: Path) -> Any:
    recognise_published_llama()
    return AutoModelForCausalLM.from_pretrained(path)


def assert_parity(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("load", [load_published, load_causal_lm, with_auto_class])
@torch.no_grad()
def test_the_published_directory_gives_the_published_numbers_without_its_code(
    published: Path, golden, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", AutoConfig.__dict__["from_pretrained"])  # undone afterwards
    model = load(published).eval()
    assert type(model) is MoHLlamaForCausalLM
    assert [(c.num_shared, c.active_heads, c.router) for c in model.config.layer_configs()] == [
        (4, 2, "query_norm")
    ] * 2
    assert_parity(model(golden["input_ids"]).logits, golden["logits"])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
@torch.no_grad()
def test_every_backend_gives_the_published_numbers(published: Path, golden, asked: None, backend: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(published, attn_implementation=f"moh_{backend}").eval()
    assert_parity(model(golden["input_ids"]).logits, golden["logits"])


def test_what_is_saved_again_is_an_ordinary_moh_model(published: Path, asked: None, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("moh_llama", ["MoHLlamaForCausalLM"])
    assert "auto_map" not in saved
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is MoHLlamaForCausalLM


def test_transformers_loads_it_as_before_unless_asked(published: Path, not_asked: None) -> None:
    assert type(AutoConfig.from_pretrained(published)) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(published)) is LlamaForCausalLM
    load_published(published), load_causal_lm(published), load_config(published)  # none of them changes it
    assert not hasattr(AutoConfig.from_pretrained.__func__, "recognises_moh")
    assert type(AutoConfig.from_pretrained(published)) is LlamaConfig


def test_asking_twice_replaces_the_function_once(asked: None) -> None:
    replaced = AutoConfig.from_pretrained.__func__
    moh.checkpoints.recognise_published_llama()
    assert AutoConfig.from_pretrained.__func__ is replaced


@pytest.mark.parametrize("published", ["shards", "bin_shards"], indirect=True)
@pytest.mark.parametrize("name", ["../elsewhere.bin", "/elsewhere.safetensors", "..", "a\\b"])
def test_an_index_names_only_files_next_to_it(published: Path, name: str) -> None:
    (index,) = published.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for load in (load_published, load_causal_lm):
        with pytest.raises(ValueError, match=rf"{index.name} must name files next to it, got"):
            load(published)


class Pickled:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("published", ["bin_file", "bin_shards"], indirect=True)
def test_weights_that_are_pickled_objects_are_refused(published: Path, tmp_path: Path) -> None:
    file = sorted(published.glob("*.bin"))[0]
    torch.save({**torch.load(file), "lm_head.weight": Pickled(tmp_path / "written")}, file)
    for load in (load_published, load_causal_lm):
        with pytest.raises(ValueError, match="can't be read"):
            load(published)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("published", ["bin_shards"], indirect=True)
def test_a_shard_that_is_missing_is_named(published: Path) -> None:
    (published / "pytorch_model-00003-of-00005.bin").unlink()
    with pytest.raises(ValueError, match=r"no file or directory .*pytorch_model-00003-of-00005\.bin"):
        load_published(published)


def test_the_published_model_has_as_many_parameters_as_its_index_says() -> None:
    """8,297,648,128: LLaMA3-8B with a vocabulary of 160,896, and no parameter of routing."""
    sizes = dict(vocab_size=160_896, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32)
    with torch.device("meta"):
        model = MoHLlamaForCausalLM(
            MoHLlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, **published_heads(32))
        )
    assert sum(p.numel() for p in model.parameters()) == 8_297_648_128


def test_remote_code_is_neither_run_nor_asked_about(published: Path, published_config, monkeypatch) -> None:
    published_config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "modeling_llama.X"}}
    (published / "config.json").write_text(json.dumps(published_config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for load in (load_causal_lm, load_config, load_tokenizer):
        with pytest.raises(ValueError, match=r"trust_remote_code|backend tokenizer"):
            load(published)


def test_the_configuration_keeps_what_the_caller_asks_for(published: Path, asked: None) -> None:
    config, unused = AutoConfig.from_pretrained(
        pretrained_model_name_or_path=published, return_unused_kwargs=True, use_cache=False, other=3
    )
    assert type(config) is MoHLlamaConfig and unused["other"] == 3
    assert config.use_cache is False and config.rope_parameters["rope_theta"] == 500_000.0
    assert type(AutoModel.from_pretrained(published, dtype=torch.bfloat16)).__name__ == "MoHLlamaModel"
    assert AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16).dtype is torch.bfloat16


def test_the_model_of_32_heads_shares_16_and_routes_8() -> None:
    assert published_heads(32) == {"router": "query_norm", "shared_heads": 16, "active_heads": 8}
    with pytest.raises(ValueError, match="must be a multiple of 4, got 6"):
        published_heads(6)


@pytest.mark.parametrize(
    ("changed", "path", "expected"),
    [
        pytest.param({}, REPOSITORY, True, id="the_hub_repository"),
        pytest.param({"auto_map": {"AutoModelForCausalLM": f"{REPOSITORY}--m.X"}}, "here", True, id="named_by_a_copy"),
        pytest.param({"auto_map": {"AutoModelForCausalLM": "some/other--m.X"}}, REPOSITORY + "x", False, id="anothers"),
        pytest.param({"auto_map": None}, REPOSITORY, False, id="no_remote_code"),
        pytest.param({"model_type": "mistral"}, REPOSITORY, False, id="no_llama"),
        pytest.param({}, "nowhere", False, id="code_not_there"),
    ],
)
def test_only_the_published_code_is_taken_for_the_published_model(published_config, changed, path, expected) -> None:
    assert is_published_llama(published_config | changed, path) is expected


@pytest.mark.parametrize("code", [None, "class LlamaForCausalLM:\n    pass\n"], ids=["plain", "with_code_of_others"])
def test_another_llama_stays_what_transformers_makes_of_it(
    published: Path, published_config, asked: None, code
) -> None:
    if code is None:
        del published_config["auto_map"]
        (published / "config.json").write_text(json.dumps(published_config))
    else:
        (published / "modeling_llama.py").write_text(code)
    assert type(AutoConfig.from_pretrained(published)) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(published)) is LlamaForCausalLM


def test_load_published_names_what_a_directory_lacks(published: Path, published_config, golden) -> None:
    with pytest.raises(ValueError, match="config must be given with a state dict"):
        load_published(golden)
    del published_config["auto_map"]
    (published / "config.json").write_text(json.dumps(published_config))
    with pytest.raises(ValueError, match="auto_map names code for AutoModelForCausalLM; it has model_type 'llama'"):
        load_published(published)
    (published / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*config\.json to read it from"):
        load_published(published)
