"""Our causal language models in vLLM: its class for models of transformers, with each head weighted in front of W_O.

vLLM reads the source of an attention's `forward` to fuse the projections and to find the one call of the attention
interface. So the attention modules get their family's own class back, a hook computes the gates from the layer's input,
and the interface, which gets them as one more argument, weights what vLLM's attention returns.
"""

from __future__ import annotations

from typing import Any

import vllm
from torch import Tensor, nn
from transformers import AttentionInterface
from vllm.config import VllmConfig

from moh.models.output_changes import OutputChanges
from moh.models.transformers.attention import RoutedAttention, weighted
from moh.models.transformers.family import Family
from moh.models.transformers.fixed import refuse_fixed_heads
from moh.models.vllm import OLDEST

_UNKNOWN = (
    f"MoH models are not supported by vLLM {vllm.__version__}, which builds models of transformers differently from "
    f"vLLM {OLDEST}, with which they are tested: "
)

try:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.models.transformers import TransformersForCausalLM, vllm_attention_forward
except ImportError as error:
    raise ImportError(f"{_UNKNOWN}{error}") from error

IMPLEMENTATION = "moh_in_vllm"
"""The `attn_implementation` of a model that vLLM has built: its own attention, with gates."""

MODEL_TYPES = (
    *("cohere", "cohere2", "gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3"),
    "starcoder2",
)
"""Dense types of the models that give the tokens of `generate` in vLLM (tests/engines/test_vllm.py)."""

_CHANGES = "output_changes"


class MoHForCausalLM(TransformersForCausalLM):  # type: ignore[misc]  # vLLM has no types here
    """Serves a causal language model of one of `MODEL_TYPES`.

    Raises:
        ValueError: the model is of another type or has layers with fixed heads, the router reads queries in a way that
            vLLM's attention doesn't get, or heads are split over processes and it needs the queries of all of them.
        ImportError: this vLLM builds models of transformers in another way.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if (model_type := config.model_type.removeprefix("moh_")) not in MODEL_TYPES:
            raise ValueError(f"model must be of a type among {', '.join(MODEL_TYPES)} in vLLM, got {model_type!r}")
        refuse_fixed_heads(config.layer_configs(), "vLLM")
        config.output_router_logits = False  # vLLM takes the hidden states alone
        self._routed: list[Any] = []
        self._is_weighted = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not self._is_weighted:  # neither method below was called: the heads would go to W_O without their gates
            raise ImportError(f"{_UNKNOWN}it has no recursive_replace or _create_attention_instances")

    def recursive_replace(self) -> None:
        """As vLLM's, of the families' own attention classes; the routers stay as they are, on every process whole."""
        self._routed = [module for module in self.model.modules() if isinstance(module, RoutedAttention)]
        for attention in self._routed:
            _check(attention.router, attention.family, attention, get_tensor_model_parallel_world_size())
            if isinstance(getattr(attention, _CHANGES, None), OutputChanges):
                delattr(attention, _CHANGES)  # what the saved W_O holds stays: vLLM has no dial
                self.ignore_unexpected_suffixes = [f".{_CHANGES}"]  # the loader asks for the module
            attention.__class__ = attention.family_attention
            attention.register_forward_pre_hook(_with_gates, with_kwargs=True)
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)
        for attention in self._routed:
            if getattr(attention.config, "_attn_implementation", None) not in ("vllm", IMPLEMENTATION):
                raise ImportError(f"{_UNKNOWN}its attention is not called 'vllm'")
            attention.config._attn_implementation = IMPLEMENTATION
        self._is_weighted = bool(self._routed)


def _check(router: Any, family: Family, attention: nn.Module, processes: int) -> None:
    if not router.reads_queries:
        return
    name = router.config.router
    if router.rounds:
        raise ValueError(
            f"router must not be {name!r} in vLLM: rotated queries are rounded again, and their norms then choose other heads; "
            "'query_norm' chooses by the unrounded norms and needs no new weights"
        )
    if processes > 1:
        raise ValueError(
            f"tensor_parallel_size must be 1 for a model with router={name!r}, which reads the queries of all heads, got "
            f"{processes}; models with the routers 'linear', 'threshold' or 'two_stage' can be split"
        )
    if family.query_norm and getattr(attention, family.query_norm, None) is not None:
        raise ValueError(
            f"router must not read the queries of a {family.config.removesuffix('Config')} in vLLM, got {name!r}: its "
            "attention gets them after their norm; convert the model with router='linear'"
        )


def _with_gates(attention: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the attention module gets: the gates too, which its `forward` passes to the attention interface."""
    router = attention.router
    if router.reads_queries:
        return args, given
    x = args[0] if args else given["hidden_states"]  # [1, tokens of all requests, C]
    return args, given | {"moh_gates": router(x).gates}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    moh_gates: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """vLLM's attention of all heads of this process, `[tokens, H * D]`, weighted by their gates.

    Args:
        module: the attention.
        query: `[1, H, tokens, D]`; where processes split the heads, H of this process.
        key, value: the same of the key/value heads.
        attention_mask: None.
        moh_gates: `[1, tokens, all heads]`; None with a router that reads the queries, whose norm rotation leaves as it is.
        **given: more arguments of the attention interface.
    """
    heads, _ = vllm_attention_forward(module, query, key, value, attention_mask, **given)
    gates = module.router(q=query.transpose(1, 2)).gates if moh_gates is None else moh_gates
    here = query.shape[1]
    if here < gates.shape[-1]:
        gates = gates.narrow(-1, get_tensor_model_parallel_rank() * here, here)
    return weighted(heads, gates[0]), None


AttentionInterface.register(IMPLEMENTATION, attend)
