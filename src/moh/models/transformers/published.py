"""The published MoH-LLaMA3-8B: recognised though its config.json calls it a Llama, loaded without its remote code, and written.

The published numbers of heads are constants of that code, not fields of the configuration: the first half of the heads is
shared, and of the other half each token activates half, by the norms of its queries. Imports neither torch nor
transformers by itself.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

REPOSITORY = "Chat-UniVi/MoH-LLaMA3-8B"
"""Name on the model hub."""

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
_OPTIONAL = (
    *("hidden_act", "attention_bias", "attention_dropout", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields of a Llama that are taken where a configuration has them."""

_ROPE_THETA = 10_000.0  # Llama's, where config.json leaves it out
_MARKS = ("self.routed_head", "self.shared_head")  # names that the published code, and no Llama's, gives its heads


def published_heads(num_heads: int) -> dict[str, Any]:
    """`router`, `shared_heads` and `active_heads` of the published model; 16 and 8 of its 32 heads.

    Raises:
        ValueError: `num_heads` is not a multiple of 4.
    """
    if num_heads % 4:
        raise ValueError(f"num_attention_heads of a published MoH-LLaMA3 must be a multiple of 4, got {num_heads}")
    return {"router": "query_norm", "shared_heads": num_heads // 2, "active_heads": num_heads // 4}


def is_published_llama(config: Mapping[str, Any], path: str | Path) -> bool:
    """Whether a configuration is that of the published MoH-LLaMA3, and not just of a Llama.

    It is if it names remote code for `AutoModelForCausalLM`, and that code is the hub repository's, or is in the
    directory and has the published names. The code is read as text and never run.

    Args:
        config: the contents of config.json.
        path: the directory that holds it, or a name on the model hub.
    """
    references = config.get("auto_map") or {}
    if config.get("model_type") != "llama" or "AutoModelForCausalLM" not in references:
        return False
    repository, _, reference = str(references["AutoModelForCausalLM"]).rpartition("--")
    if REPOSITORY in (repository, str(path)):
        return True
    code = Path(path) / f"{reference.partition('.')[0]}.py"
    if repository or not code.is_file():
        return False
    text = code.read_text(encoding="utf-8", errors="replace")
    return all(mark in text for mark in _MARKS)


def recognised(config: Any, path: str | Path, asked: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The `MoHLlamaConfig` of the published model, if the configuration that was read from `path` is its; else `config`.

    Args:
        config: as transformers made it.
        path: the directory or hub name that it was read from.
        asked: the arguments of `from_pretrained`, some of which only `MoHLlamaConfig` has.
    """
    if type(config).__name__ != "LlamaConfig" or not getattr(config, "auto_map", None):
        return config
    return _converted(config, asked) if is_published_llama(config.to_dict(), path) else config


def recognise_published_llama() -> None:
    """Let transformers' Auto classes load the published model as what it is, in the whole process.

    `AutoConfig.from_pretrained`, which they call, is replaced by a function that returns a `MoHLlamaConfig` for it, and
    every other configuration as transformers made it. `load_published` and our commands need no such call. Registering a
    class for "llama" instead would change what every Llama loads as.
    """
    auto = importlib.import_module("transformers").AutoConfig
    original = auto.from_pretrained.__func__
    if getattr(original, "recognises_moh", False):
        return

    def from_pretrained(cls: type[Any], /, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        found = original(cls, pretrained_model_name_or_path, **kwargs)
        config, unused = found if isinstance(found, tuple) else (found, {})
        ours = recognised(config, pretrained_model_name_or_path, kwargs)
        if ours is config:
            return found
        return (ours, {k: v for k, v in unused.items() if not hasattr(ours, k)}) if isinstance(found, tuple) else ours

    functools.update_wrapper(from_pretrained, original)
    from_pretrained.recognises_moh = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def _converted(config: Any, asked: Mapping[str, Any]) -> Any:
    """The `MoHLlamaConfig` of the published model, from the `LlamaConfig` that its config.json makes."""
    from moh.models.transformers import MoHLlamaConfig

    fields = config.to_dict() | published_heads(config.num_attention_heads)
    for name in ("auto_map", "model_type"):
        del fields[name]
    fields |= {
        name: value for name, value in asked.items() if hasattr(MoHLlamaConfig, name) and not hasattr(config, name)
    }
    ours = MoHLlamaConfig.from_dict(fields | {"architectures": ["MoHLlamaForCausalLM"]})
    ours.name_or_path = config.name_or_path
    return ours


def read_published_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a directory laid out as published: config.json of a Llama that names remote code.

    Raises:
        ValueError: there is no such file, or it belongs to another model.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(f"config must be given: there is no {file} to read it from")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from None
    if fields.get("model_type") != "llama" or "AutoModelForCausalLM" not in (fields.get("auto_map") or {}):
        raise ValueError(
            f"config must be given: {file} does not belong to the published MoH-LLaMA3, whose model_type is 'llama' and whose "
            f"auto_map names code for AutoModelForCausalLM; it has model_type {fields.get('model_type')!r} and auto_map "
            f"{fields.get('auto_map')!r}"
        )
    heads = published_heads(fields["num_attention_heads"])
    found = {"tie_word_embeddings": False, **fields, "model": "moh_llama"}
    parameters = fields.get("rope_parameters") or {}
    found["rope_theta"] = fields.get("rope_theta") or parameters.get("rope_theta", _ROPE_THETA)
    if rope := fields.get("rope_scaling") or {k: v for k, v in parameters.items() if k != "rope_theta"}:
        found["rope"] = {"rope_type": rope.get("type", "default"), **rope}
    return found | {
        "router": heads["router"],
        "shared_heads": heads["shared_heads"],
        "routed_active": heads["active_heads"],
    }


def load(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A `MoHLlamaForCausalLM` of the published sizes with the published weights.

    Args:
        config: the sizes under Llama's names, `rope_theta`, `rope` (a rope type, "default" if left out, or its
            parameters), `router` ("query_norm"), `shared_heads` and `routed_active`.
    """
    import torch

    from moh.models.published import check_tensors, require_keys
    from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

    require_keys(config, (*_LLAMA_FIELDS, "rope_theta", "router", "shared_heads", "routed_active"))
    rope = config.get("rope", "default")
    ours = MoHLlamaConfig(
        **{key: config[key] for key in (*_LLAMA_FIELDS, *_OPTIONAL) if key in config},
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
    check_tensors(state, expected)
    dtype = dtype if dtype is not None else state["model.embed_tokens.weight"].dtype
    model = MoHLlamaForCausalLM.from_pretrained(None, config=ours, state_dict=state, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


def save(model: Any, directory: Path) -> None:
    """Write a directory of the published layout; see `moh.models.published.save_published`."""
    from moh._extras import require
    from moh._files import replacing_directory, write_text
    from moh.models.published import cpu_tensors

    config = _published_config(model)
    with replacing_directory(directory) as scratch:
        write_text(scratch / "config.json", json.dumps(config, indent=2) + "\n")
        model.generation_config.save_pretrained(scratch)
        state = cpu_tensors(model.state_dict())
        if config["tie_word_embeddings"]:
            del state["lm_head.weight"]  # the published code ties it; of two names for a tensor, files keep one
        require("huggingface_hub", extra="hf").save_torch_state_dict(state, scratch)


def _published_config(model: Any) -> dict[str, Any]:
    """The published config.json of a `MoHLlamaForCausalLM`, with the names that transformers 4.37 and the code read.

    Raises:
        ValueError: the published code can't express the model.
    """
    from moh.models.published import check_heads

    config, refused = model.config, "model can't be saved as published: "
    layers = config.layer_configs()
    check_heads(layers, routers=("query_norm", "query_norm_rounded"))
    wanted = published_heads(config.num_attention_heads)
    for number, heads in enumerate(layers):
        if (heads.num_shared, heads.active_heads) != (wanted["shared_heads"], wanted["active_heads"]):
            raise ValueError(
                f"{refused}layer {number} must have {wanted['shared_heads']} shared and {wanted['active_heads']} active of its "
                f"{heads.num_heads} heads, which are constants of the published code, got {heads.num_shared} and "
                f"{heads.active_heads}"
            )
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    for name, value, allowed in (
        ("head_dim", config.head_dim, (config.hidden_size // config.num_attention_heads,)),
        ("mlp_bias", config.mlp_bias, (False,)),
        ("rope_type", kind, ("default", "linear", "dynamic")),
    ):
        if value not in allowed:
            raise ValueError(f"{refused}{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"{REPOSITORY}--modeling_llama.LlamaForCausalLM"},
        "model_type": "llama",
        **{name: getattr(config, name) for name in (*_LLAMA_FIELDS, *_OPTIONAL)},
        "pretraining_tp": 1,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
