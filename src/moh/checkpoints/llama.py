"""The published MoH-LLaMA3: Llama's tensor names, the query-norm router without parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh.checkpoints.reading import check_tensors, require_keys

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


def load(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A `moh.models.llama.MoHLlamaForCausalLM` of the published sizes with the published weights.

    Args:
        config: the sizes under Llama's names, `rope_theta`, `rope` (a rope type, "default" if left out, or its
            parameters), `router` ("query_norm"), `shared_heads` and `routed_active`.
    """
    require("transformers", extra="llm")
    from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM

    require_keys(config, (*_LLAMA_FIELDS, "rope_theta", "router", "shared_heads", "routed_active"))
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
    check_tensors(state, expected)
    dtype = dtype if dtype is not None else state["model.embed_tokens.weight"].dtype
    model = MoHLlamaForCausalLM.from_pretrained(None, config=ours, state_dict=state, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]
