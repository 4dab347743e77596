"""Promise: the files that `save_published` writes are what the authors' loaders read: keys, shapes and configuration.

Their loaders are strict: MoH-ViT's `main.py --resume` takes `checkpoint["model"]`, MoH-DiT's `sample.py --ckpt` takes
`checkpoint["ema"]`, both into a model that is made by name; MoH-LLaMA3 is read by transformers 4.37 as a Llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")
pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

import timm
import transformers
from safetensors.torch import load_file, safe_open

from moh.models.diffusers import create_dit
from moh.models.diffusers import published as dit
from moh.models.published import NAMES, named_config, save_published
from moh.models.timm.transnext import published as transnext
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = {
    family: json.loads((GOLDEN / f"layout_{file}.json").read_text(encoding="utf-8"))
    for family, file in (("transnext", "vit"), ("dit", "dit"))
}
KEYS = {"transnext": "model", "dit": "ema"}  # that the authors' commands read
STATED = {  # in their training's arguments, by their names
    "transnext": {"input_size": 224, "nb_classes": 1000},
    "dit": {"image_size": 256, "num_classes": 1000},
}


def make(name: str) -> torch.nn.Module:
    if NAMES[name] == "transnext":
        made: torch.nn.Module = timm.create_model(name)
        return made
    return create_dit("moh_" + name.removeprefix("MoH-").replace("/", "_").replace("-", "_").lower())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_published_size_is_what_the_authors_command_reads(name: str, tmp_path: Path, monkeypatch) -> None:
    family, written = NAMES[name], {}
    for module in (transnext, dit):
        monkeypatch.setattr(module, "write_checkpoint", lambda file, contents: written.update(contents))
        monkeypatch.setattr(module, "cpu_tensors", dict)
    with torch.device("meta"):  # shapes without numbers: the largest is 2.7 GB
        model = make(name)
    save_published(model, tmp_path / "model.pt")
    assert written.keys() == {KEYS[family], "args"}
    state = written[KEYS[family]]
    assert {key: list(tensor.shape) for key, tensor in state.items()} == LAYOUTS[family][name]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    stated = written["args"]
    assert stated["model"] == name
    assert {key: stated[key] for key in STATED[family]} == STATED[family]
    expected = {key: value for key, value in named_config(name, state).items() if key != "model"}
    assert {key: _plain(stated[key]) for key in expected} == {key: _plain(value) for key, value in expected.items()}
    json.dumps(stated)  # plain numbers and lists, which `weights_only` allows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


LLAMA_FIELDS = {  # of transformers 4.37's LlamaConfig that the published modeling_llama.py reads
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 5e5,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True,
    "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_a_directory_that_transformers_reads_as_a_llama(tied: bool, tmp_path: Path) -> None:
    expected = LLAMA_FIELDS | {"tie_word_embeddings": tied}
    ours = {
        key: value for key, value in expected.items() if key not in ("rope_theta", "rope_scaling", "pretraining_tp")
    }
    rope = {"rope_theta": expected["rope_theta"], "rope_type": "default"}
    heads = dict(router="query_norm", shared_heads=4, active_heads=2)
    config = MoHLlamaConfig(**ours, **heads, rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    save_published(MoHLlamaForCausalLM(config), tmp_path / "saved")
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    written = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in expected} == expected
    assert written["model_type"] == "llama" and written["architectures"] == ["LlamaForCausalLM"]
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, None)
    assert written["torch_dtype"] == "float32"
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours, rope_parameters=rope))
    layout = {name: list(tensor.shape) for name, tensor in llama.state_dict().items()}
    if tied:
        del layout["lm_head.weight"]
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == layout
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"  # transformers 4.37 refuses a file without it
