"""The config.json of the published MoH-LLaMA3-8B -> the keys that `moh.checkpoints.llama` reads.

Not for the other published models, which come without a file that tells their configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moh.models.transformers.published import published_heads

_ROPE_THETA = 10_000.0  # Llama's, where config.json leaves it out


def read_published_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a directory laid out as published: config.json of a Llama that names remote code.

    Raises:
        ValueError: there is no such file, or it is another model's.
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
            f"config must be given: {file} is not that of the published MoH-LLaMA3, whose model_type is 'llama' and whose "
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
