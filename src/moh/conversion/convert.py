"""`moh.convert`: a pretrained dense model -> the same model with MoH attention, calibrated in closed form.

No gradient step is taken; see `moh.training` for that. Query-norm router: the paper's; the other fits: ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moh.config import MoHConfig
from moh.conversion.calibrator import Calibrator
from moh.conversion.families import moh_config_fields
from moh.conversion.tokens import calibration_blocks
from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.models.loading import load_causal_lm, load_tokenizer
from moh.routing import Router

ALLOCATIONS = ("even", "sensitivity")
"""How `moh.convert` hands out the heads: the same number in every layer, or more to layers that need them more."""


def convert(
    model_or_path: PreTrainedModel | str | Path,
    *,
    shared_heads: int | Sequence[int],
    active_heads: int | Sequence[int],
    router: str = "linear",
    calibration: Sequence[str] | Sequence[Sequence[int]] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int = 12_288,
    seq_len: int = 512,
    batch_size: int = 4,
    allocation: str = "even",
    refit_output: bool = False,
    router_aux_loss_coef: float = 0.0,
    progress: bool = True,
) -> MoHLlamaForCausalLM:
    """Turn a pretrained dense language model into a MoH model with the same weights.

    Args:
        model_or_path: a transformers model of the Llama family (Llama, Mistral, Qwen2, SmolLM), or a directory, hub
            name or .gguf file to load one from. A model that is passed stays as it is: its weights are copied.
        shared_heads: h_s, heads that every token uses, or their indices. A number means the first ones for the
            query-norm router, and for the others the ones with the largest mean contribution.
        active_heads: k, routed heads that each token activates; a number, or one per layer.
        router: "linear" (the contribution router, fitted), "query_norm" (the paper's, nothing to fit) or "two_stage"
            (learned; fitted to the contributions' order so that training starts near the dense model).
        calibration: texts, sequences of token ids, or token ids `[n, N]`; needed unless router="query_norm", which
            has nothing to fit and does not look at it.
        tokenizer: for texts; default is the one saved with the model.
        calibration_tokens: at most so many tokens of `calibration` are used.
        seq_len: texts are packed into blocks of so many tokens.
        batch_size: blocks per forward pass.
        allocation: "even", or "sensitivity" to spend the same total unevenly, by an estimate of what each layer
            loses (`moh.conversion.allocation`).
        refit_output: fit W_O anew so that the kept heads make up for the skipped ones. With all heads active W_O stays
            the same; otherwise the model is tied to this budget of heads.
        router_aux_loss_coef: weight of the load-balance loss in `outputs.loss` (0: none).
        progress: show progress bars.

    Returns:
        the MoH model, in evaluation mode. With all heads active and `refit_output=False` its logits are the original's.

    Raises:
        ValueError: the model can't be converted, or an argument is out of range or missing; nothing was changed.

    Examples:
        >>> model = moh.convert("HuggingFaceTB/SmolLM2-135M", shared_heads=4, active_heads=3,
        ...                     calibration=texts, allocation="sensitivity", refit_output=True)  # doctest: +SKIP
        >>> model.save_pretrained("smollm2-moh")  # doctest: +SKIP
    """
    given = isinstance(model_or_path, PreTrainedModel)
    dense = model_or_path if isinstance(model_or_path, PreTrainedModel) else load_causal_lm(model_or_path)
    fields = moh_config_fields(dense.config, router)
    layers = _requested_layers(dense.config, shared_heads, active_heads, router)
    _check(router, allocation, refit_output, shared_heads, calibration, batch_size)
    calibrator = None
    if calibration is not None and router != "query_norm":
        if tokenizer is None and not given:
            tokenizer = load_tokenizer(model_or_path)
        blocks = calibration_blocks(calibration, tokenizer, calibration_tokens, seq_len, dense.config.vocab_size)
        calibrator = Calibrator(dense, blocks, batch_size, progress)

    routers: Sequence[Router] = []
    output_weights: list[Tensor] = []
    if router != "query_norm":
        assert calibrator is not None
        routers = calibrator.fit_routers(layers)
        if allocation == "sensitivity":
            total = sum(c.num_shared + c.active_heads for c in layers)
            routers = calibrator.reallocate(routers, calibrator.costs(routers), total)
        layers = [r.config for r in routers]
        if refit_output:
            output_weights = calibrator.refit_outputs(routers)
    config = MoHLlamaConfig(
        **fields,
        router=router,
        shared_heads=_compact(
            [c.shared_heads if isinstance(c.shared_heads, int) else list(c.shared_indices) for c in layers]
        ),
        active_heads=_compact([c.active_heads for c in layers]),
        router_aux_loss_coef=router_aux_loss_coef,
    )
    return build(dense, config, routers, output_weights, copied=given)


def _requested_layers(
    config: PreTrainedConfig, shared_heads: int | Sequence[int], active_heads: int | Sequence[int], router: str
) -> list[MoHConfig]:
    """Each layer's heads as asked for."""
    active = [active_heads] * config.num_hidden_layers if isinstance(active_heads, int) else list(active_heads)
    if len(active) != config.num_hidden_layers:
        raise ValueError(
            f"active_heads must be a number or have one entry per layer ({config.num_hidden_layers}), "
            f"got {len(active)} entries"
        )
    return [MoHConfig(config.num_attention_heads, shared_heads, k, router) for k in active]


def _check(
    router: str,
    allocation: str,
    refit_output: bool,
    shared_heads: int | Sequence[int],
    calibration: object,
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, got {allocation!r}")
    if router != "linear" and (allocation != "even" or refit_output):
        raise ValueError(f"allocation='sensitivity' and refit_output=True need router='linear', got router={router!r}")
    if allocation == "sensitivity" and not isinstance(shared_heads, int):
        raise ValueError("shared_heads must be a number for allocation='sensitivity', got a list of heads")
    if router != "query_norm" and calibration is None:
        raise ValueError(f"calibration must be given for router={router!r}: texts or token ids to fit the router on")


def _compact(values: list[Any]) -> Any:
    """One number where all layers have the same number, as a person would write it."""
    return values[0] if isinstance(values[0], int) and len(set(map(str, values))) == 1 else values


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
