"""The conversion's adapter for language models of the Llama family: dense transformers model -> `MoHLlamaForCausalLM`.

`DenseTextModel` is what all models that read text share. Which models belong to the family is in `families.py`; those of
other families are in `family_models.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh.config import MoHConfig
from moh.conversion.dense import DenseAttention, DenseModel
from moh.conversion.families import check_projections, moh_config_fields
from moh.conversion.tokens import calibration_blocks
from moh.models.heads import compact_heads
from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.routing import Router, router_class

CAUSAL_LM = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

SEQ_LEN = 512
"""Tokens of a block of packed texts, unless asked for otherwise."""


class DenseTextModel(DenseModel):
    """A dense model of transformers that reads token ids."""

    model: PreTrainedModel

    def needs_calibration(self, router: str) -> bool:
        return router_class(router).is_fitted

    def samples(
        self, calibration: Any, *, max_tokens: int, tokenizer: PreTrainedTokenizerBase | None, seq_len: int | None
    ) -> Tensor:
        """Token ids `[n, N]`."""
        seq_len = SEQ_LEN if seq_len is None else seq_len
        return calibration_blocks(calibration, tokenizer, max_tokens, seq_len, self.model.config.vocab_size)

    def tokens_per_sample(self, samples: Tensor) -> int:
        return samples.shape[1]

    def run(self, samples: Tensor) -> None:
        self.model.base_model(input_ids=samples, use_cache=False)

    def loss(self, samples: Tensor) -> Tensor:
        """Next-token cross-entropy."""
        embedded = self.model.get_input_embeddings()(samples).requires_grad_()
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), samples[:, 1:].flatten(), reduction="sum")


class DenseLanguageModel(DenseTextModel):
    """A dense causal language model of the Llama family.

    Args:
        model: of the Llama family.
        copied: False lets the MoH model have the dense model's own tensors.

    Raises:
        ValueError: the model is of another family or class, or its projections are not plain.
    """

    def __init__(self, model: PreTrainedModel, *, copied: bool) -> None:
        self._fields = moh_config_fields(model.config)
        if type(model).__name__ not in CAUSAL_LM:
            raise ValueError(
                f"model must be a causal language model ({', '.join(CAUSAL_LM)}), got {type(model).__name__}: convert the "
                "language model that it was made from"
            )
        self._copied = copied
        self.model = model
        self.num_heads = model.config.num_attention_heads
        self.kv_heads = model.config.num_key_value_heads
        self.attentions = [
            DenseAttention(layer.self_attn.q_proj, layer.self_attn.o_proj) for layer in model.get_decoder().layers
        ]
        check_projections(model, self.attentions)

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[Tensor],
        *,
        router_aux_loss_coef: float,
    ) -> MoHLlamaForCausalLM:
        config = MoHLlamaConfig(
            **self._fields,
            router=layers[0].router,
            routing_unit=layers[0].routing_unit,
            **compact_heads(layers),
            router_aux_loss_coef=router_aux_loss_coef,
        )
        return build(self.model, config, routers, output_weights, copied=self._copied)


def build(
    dense: PreTrainedModel,
    config: MoHLlamaConfig,
    routers: Sequence[nn.Module],
    output_weights: Sequence[Tensor],
    *,
    copied: bool,
) -> MoHLlamaForCausalLM:
    """The MoH model with the dense model's weights, the fitted routers and, if any, the refitted output weights."""
    state = {name: tensor.clone() if copied else tensor for name, tensor in dense.state_dict().items()}
    for index, router in enumerate(routers):
        for name, tensor in router.state_dict().items():
            state[f"model.layers.{index}.self_attn.router.{name}"] = tensor.to(dense.device, dense.dtype)
    for index, weight in enumerate(output_weights):
        state[f"model.layers.{index}.self_attn.o_proj.weight"] = weight
    model = MoHLlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dense.dtype, attn_implementation="sdpa"
    )
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.to(dense.device).eval()  # type: ignore[no-any-return]
