"""Recognise the published MoH-LLaMA3-8B, whose config.json calls it a Llama, and load it without its remote code.

The published numbers of heads are constants of that code, not fields of the configuration: the first half of the heads is
shared, and of the other half each token activates half, by the norms of its queries. Not for reading weights. Imports
nothing of transformers by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = "Chat-UniVi/MoH-LLaMA3-8B"
"""Name on the model hub."""

_AUTO = "transformers.models.auto.configuration_auto"
_MARKS = ("self.routed_head", "self.shared_head")  # names that the published code, and no Llama's, gives its heads


def published_heads(num_heads: int) -> dict[str, Any]:
    """`router`, `shared_heads` and `active_heads` of the published model; 16 and 8 of its 32 heads.

    Raises:
        ValueError: `num_heads` is no multiple of 4.
    """
    if num_heads % 4:
        raise ValueError(f"num_attention_heads of a published MoH-LLaMA3 must be a multiple of 4, got {num_heads}")
    return {"router": "query_norm", "shared_heads": num_heads // 2, "active_heads": num_heads // 4}


def is_published_llama(config: Mapping[str, Any], path: str | Path) -> bool:
    """Whether a configuration is that of the published MoH-LLaMA3, and not just of a Llama.

    It is if it names remote code for `AutoModelForCausalLM`, and that code is the hub repository's, or lies in the
    directory and has the published names. The code is looked at as text and never run.

    Args:
        config: what config.json says.
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


def recognise_published_llama() -> None:
    """Let `AutoConfig.from_pretrained`, which the Auto classes of models call, give a `MoHLlamaConfig` for the published one.

    To be called once `transformers.models.auto.configuration_auto` is imported. Every other configuration is returned as
    transformers made it. Registering a class for "llama" instead would change what every Llama loads as.
    """
    auto = sys.modules[_AUTO].AutoConfig
    original = auto.from_pretrained.__func__

    def from_pretrained(cls: type[Any], /, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        found = original(cls, pretrained_model_name_or_path, **kwargs)
        config, unused = found if isinstance(found, tuple) else (found, {})
        if type(config).__name__ != "LlamaConfig" or not getattr(config, "auto_map", None):
            return found
        if not is_published_llama(config.to_dict(), pretrained_model_name_or_path):
            return found
        ours = _converted(config, kwargs)
        return (ours, {k: v for k, v in unused.items() if not hasattr(ours, k)}) if isinstance(found, tuple) else ours

    functools.update_wrapper(from_pretrained, original)
    auto.from_pretrained = classmethod(from_pretrained)


def _converted(config: Any, asked: Mapping[str, Any]) -> Any:
    """The `MoHLlamaConfig` of the published model, from the `LlamaConfig` that its config.json makes.

    `asked` are the arguments of `from_pretrained`, of which ours knows more than Llama's.
    """
    from moh.models.llama import MoHLlamaConfig

    fields = config.to_dict() | published_heads(config.num_attention_heads)
    for name in ("auto_map", "model_type"):
        del fields[name]
    fields |= {
        name: value for name, value in asked.items() if hasattr(MoHLlamaConfig, name) and not hasattr(config, name)
    }
    ours = MoHLlamaConfig.from_dict(fields | {"architectures": ["MoHLlamaForCausalLM"]})
    ours._name_or_path = config._name_or_path
    return ours
