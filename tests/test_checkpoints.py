"""Promise: published checkpoints load exactly into our models; errors name what does not match."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the llm extra is not installed")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moh.models.published import load_published
from moh.models.transformers import MoHLlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden" / "llama_a.safetensors"
PREFIX = "state."


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def config() -> dict[str, Any]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.fixture
def state(golden) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): t.clone() for name, t in golden.items() if name.startswith(PREFIX)}


def state_dict(state: dict[str, Tensor], folder: Path) -> Any:
    return state


def safetensors_file(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def directory(state: dict[str, Tensor], folder: Path) -> str:
    save_file(state, folder / "anything.safetensors")
    return str(folder)


def sharded_directory(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: state[name] for name in members}, folder / file)
    save_file({"left": torch.zeros(1)}, folder / "not-listed.safetensors")
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def pytorch_file(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def pytorch_file_with_a_model_entry(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state, "step": 3}, folder / "weights.pth")
    return folder / "weights.pth"


FORMS = [
    state_dict,
    safetensors_file,
    directory,
    sharded_directory,
    pytorch_file,
    pytorch_file_with_a_model_entry,
]


def assert_parity(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@torch.no_grad()
def test_the_published_numbers_come_from_every_form(state, config, golden, tmp_path: Path, form) -> None:
    model = load_published(form(state, tmp_path), config)
    assert isinstance(model, MoHLlamaForCausalLM) and not model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert_parity(model(golden["input_ids"]).logits, golden["logits"])


@torch.no_grad()
def test_left_padding_and_generation_are_the_published_ones(state, config, golden) -> None:
    model = load_published(state, config)
    mask = golden["attention_mask"]
    got = model(golden["input_ids"], attention_mask=mask, position_ids=golden["position_ids"]).logits
    assert_parity(got[mask.bool()], golden["logits_left_padded"][mask.bool()])
    prompt = golden["greedy"][:, :-24]
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    assert got.tolist() == golden["greedy"].tolist()


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}], ids=["left_out", "with_options"])
@torch.no_grad()
def test_the_rope_type_may_be_left_out_or_have_options(state, config, golden, rope) -> None:
    del config["rope"]
    if rope is not None:
        config["rope"] = rope
    logits = load_published(state, config)(golden["input_ids"]).logits
    assert torch.allclose(logits, golden["logits"], atol=1e-4) is (rope is None)


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float16), (torch.float32, torch.float32)], ids=str)
def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(state, config, dtype, expected) -> None:
    model = load_published({name: t.half() for name, t in state.items()}, config, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("with_head", [True, False], ids=["head_listed", "head_left_out"])
def test_tied_embeddings_need_no_tensor_of_their_own(state, config, with_head) -> None:
    config["tie_word_embeddings"] = True
    if with_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    else:
        del state["lm_head.weight"]
    names = set(state)
    model = load_published(state, config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])
    assert set(state) == names  # the caller's dictionary is unchanged


def test_tensors_that_are_missing_left_over_or_misshapen_are_named(state, config) -> None:
    del state["model.norm.weight"]
    state["model.layers.0.extra"] = torch.zeros(1)
    state["lm_head.weight"] = torch.zeros(96, 64)
    with pytest.raises(ValueError) as error:
        load_published(state, config)
    message = str(error.value)
    assert "missing tensors: model.norm.weight" in message
    assert "unexpected tensors: model.layers.0.extra" in message
    assert "lm_head.weight has shape (96, 64), expected (97, 64)" in message


def test_an_untied_model_needs_its_head(state, config) -> None:
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        load_published(state, config)


@pytest.mark.parametrize("model", ["moh_vit", None, 3])
def test_an_unknown_model_is_refused(state, config, model) -> None:
    with pytest.raises(ValueError, match=r"config\['model'\] must be one of 'moh_llama'"):
        load_published(state, config | {"model": model})


@pytest.mark.parametrize("key", ["model", "router", "routed_active", "rope_theta", "hidden_size"])
def test_a_missing_key_of_the_configuration_is_named(state, config, key) -> None:
    del config[key]
    with pytest.raises(ValueError, match=f"(key '{key}')|(missing: {key})"):
        load_published(state, config)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_with_an_arbitrary_object_is_refused_unopened(config, tmp_path: Path) -> None:
    torch.save({"model": Bomb(tmp_path / "trace")}, tmp_path / "weights.pt")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_published(tmp_path / "weights.pt", config)
    assert not (tmp_path / "trace").exists()


def test_files_that_hold_no_weights_are_refused(config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file or directory .*gone\.safetensors"):
        load_published(tmp_path / "gone.safetensors", config)
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        load_published(tmp_path, config)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no state dict"):
        load_published(tmp_path / "list.pt", config)


def test_a_shard_that_is_not_there_is_named(state, config, tmp_path: Path) -> None:
    sharded_directory(state, tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no file or directory .*model-2\.safetensors"):
        load_published(tmp_path, config)
