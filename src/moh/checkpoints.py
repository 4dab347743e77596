"""Load checkpoints that the authors of the paper published, into our models, exactly.

Here: `moh_llama` (MoH-LLaMA3: Llama's tensor names, query-norm router). Our own checkpoints need only `from_pretrained`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require

_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def load_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build our model from a published checkpoint.

    Args:
        path_or_state_dict: tensors by their published names; or a `.safetensors` file; or a directory with one, or
            with the shards that `model.safetensors.index.json` lists; or a PyTorch file, read with `weights_only=True`.
        config: the published keys. For `moh_llama`: `model` ("moh_llama"), the sizes under Llama's names, `rope_theta`,
            `rope` (a rope type, "default" if left out), `router` ("query_norm"), `shared_heads` and `routed_active`.
        dtype: of the model; None keeps the checkpoint's.

    Returns:
        the model in evaluation mode; for `moh_llama` a `moh.models.llama.MoHLlamaForCausalLM`.

    Raises:
        ValueError: an unknown model, a key missing from `config`, a file that isn't there, or tensors that are missing,
            left over or of another shape than the configuration says; the message names them.
    """
    SafetensorError = require("safetensors", extra="llm").SafetensorError
    if "model" not in config:
        raise ValueError("config must have the key 'model'")
    if config["model"] != "moh_llama":
        raise ValueError(f"config['model'] must be 'moh_llama', got {config['model']!r}")
    if isinstance(path_or_state_dict, Mapping):
        state = {name: tensor.clone() for name, tensor in path_or_state_dict.items()}  # training must not change theirs
    else:
        path = Path(path_or_state_dict)
        try:
            state = _read(path)
        except (
            SafetensorError,
            pickle.UnpicklingError,
            KeyError,
            json.JSONDecodeError,
            RuntimeError,
            EOFError,
        ) as error:
            raise ValueError(
                f"path_or_state_dict: {path} can't be read as tensors: {' '.join(str(error).split())}"
            ) from None
    return _llama(state, config, dtype)


def _llama(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    require("transformers", extra="llm")
    from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM

    needed = (*_LLAMA_FIELDS, "rope_theta", "router", "shared_heads", "routed_active")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"config must have the keys {', '.join(needed)}; missing: {', '.join(missing)}")
    rope = config.get("rope", "default")
    ours = MoHLlamaConfig(
        **{key: config[key] for key in _LLAMA_FIELDS},
        rope_parameters={
            "rope_theta": config["rope_theta"],
            **(rope if isinstance(rope, dict) else {"rope_type": rope}),
        },
        router=config["router"],
        shared_heads=config["shared_heads"],
        active_heads=config["routed_active"],
    )
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MoHLlamaForCausalLM(ours).state_dict().items()}
    if ours.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    _check_tensors(state, expected)
    dtype = dtype if dtype is not None else state["model.embed_tokens.weight"].dtype
    model = MoHLlamaForCausalLM.from_pretrained(None, config=ours, state_dict=state, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing tensors: {_some(missing)}")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected tensors: {_some(extra)}")
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name]:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name])}")
    if problems:
        raise ValueError("the checkpoint does not fit the configuration: " + "; ".join(problems[:8]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or directory; never by unpickling arbitrary objects."""
    safetensors = require("safetensors.torch", extra="llm")
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / name for name in shards]
        else:
            files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"path_or_state_dict: the directory {path} holds no .safetensors file")
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read(file)
        return tensors
    if not path.is_file():
        raise ValueError(f"path_or_state_dict: there is no file or directory {path}")
    if path.suffix == ".safetensors":
        return dict(safetensors.load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"path_or_state_dict: {path} holds no state dict")
    return state
