"""`moh.convert`: a pretrained dense model -> the same model with MoH attention, calibrated in closed form.

No gradient step is taken; see `moh.training` for that. Query-norm router: the paper's; the other fits: ours.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from moh.config import MoHConfig
from moh.conversion.allocation import allocate, layer_costs
from moh.conversion.families import moh_config_fields
from moh.conversion.fit import ContributionFit, fit_contributions, fit_two_stage_logits, refit_output_projection
from moh.conversion.statistics import ContributionSums, collect_contributions, collect_outputs
from moh.conversion.tokens import calibration_blocks
from moh.models.llama import MoHLlamaConfig, MoHLlamaForCausalLM
from moh.models.loading import load_causal_lm, load_tokenizer
from moh.routing import LinearRouter, Router, TwoStageRouter

ALLOCATIONS = ("even", "sensitivity")
"""How `moh.convert` hands out the heads: the same number in every layer, or more to layers that need them more."""

COST_TOKENS = 4096
"""Calibration tokens of the pass that estimates the layers' costs: with its backward half it is three times as dear."""

MIN_HEADS = 4
"""Fewest heads of a layer under the "sensitivity" allocation (or all, if the model has fewer)."""


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
        calibration: texts, sequences of token ids, or token ids `[n, N]`; needed unless router="query_norm".
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
    _check(router, allocation, refit_output, shared_heads, calibration)
    calibrator = None
    if calibration is not None:
        if tokenizer is None and not given:
            tokenizer = load_tokenizer(model_or_path)
        blocks = calibration_blocks(calibration, tokenizer, calibration_tokens, seq_len, dense.config.vocab_size)
        calibrator = _Calibrator(dense, blocks, batch_size, progress)

    routers: Sequence[Router] = []
    output_weights: list[Tensor] = []
    if router != "query_norm":
        assert calibrator is not None
        routers = calibrator.fit_routers(layers)
        if allocation == "sensitivity":
            routers = calibrator.reallocate(routers)
        layers = [r.config for r in routers]
        if refit_output:
            output_weights = calibrator.refit_outputs(routers)
    config = MoHLlamaConfig(
        **fields,
        router=router,
        shared_heads=_compact([list(c.shared_indices) if routers else c.num_shared for c in layers]),
        active_heads=_compact([c.active_heads for c in layers]),
        router_aux_loss_coef=router_aux_loss_coef,
    )
    return _build(dense, config, routers, output_weights, copied=given)


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
    router: str, allocation: str, refit_output: bool, shared_heads: int | Sequence[int], calibration: object
) -> None:
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, got {allocation!r}")
    if router != "linear" and (allocation != "even" or refit_output):
        raise ValueError(f"allocation='sensitivity' and refit_output=True need router='linear', got router={router!r}")
    if allocation == "sensitivity" and not isinstance(shared_heads, int):
        raise ValueError("shared_heads must be a number for allocation='sensitivity', got a list of heads")
    if router != "query_norm" and calibration is None:
        raise ValueError(f"calibration must be given for router={router!r}: texts or token ids to fit the router on")
    if router == "query_norm" and calibration is not None:
        raise ValueError("calibration must be None for router='query_norm', which has nothing to fit")


class _Calibrator:
    """The calibration passes over one dense model."""

    def __init__(self, dense: PreTrainedModel, blocks: Tensor, batch_size: int, progress: bool) -> None:
        self._dense = dense
        self._attentions = [layer.self_attn for layer in dense.get_decoder().layers]
        self._fits: list[ContributionFit] = []
        self._blocks = blocks
        self._batch_size = batch_size
        self._progress = progress

    def fit_routers(self, layers: Sequence[MoHConfig]) -> Sequence[LinearRouter | TwoStageRouter]:
        """One router per layer. A number of shared heads becomes the set of those that contribute most."""
        batches = self._batches("recording what each head contributes", self._blocks, self._batch_size)
        sums = collect_contributions(self._dense.get_decoder(), self._attentions, batches, layers[0].num_heads)
        self._fits = [fit_contributions(s) for s in sums]
        routers: list[LinearRouter | TwoStageRouter] = []
        for layer, layer_sums, fit in zip(layers, sums, self._fits, strict=True):
            config = layer
            if isinstance(layer.shared_heads, int):
                config = dataclasses.replace(layer, shared_heads=fit.strongest(layer.shared_heads))
            routers.append(
                _linear_router(config, fit) if layer.router == "linear" else _two_stage_router(config, layer_sums)
            )
        return routers

    def reallocate(self, routers: Sequence[Any]) -> list[LinearRouter]:
        """Routers with the same total of heads, shared out by what each layer is estimated to lose."""
        blocks = self._blocks[: max(1, COST_TOKENS // self._blocks.shape[1])]
        batches = self._batches("estimating what each layer needs", blocks, max(1, self._batch_size // 2))
        costs = layer_costs(self._dense, self._attentions, routers, batches)
        total = sum(r.config.num_shared + r.config.active_heads for r in routers)
        budget = allocate(costs, total, at_least=min(MIN_HEADS, total // len(routers)))
        reallocated = []
        for router, fit, heads in zip(routers, self._fits, budget, strict=True):
            shared = fit.strongest(min(router.config.num_shared, heads))
            config = MoHConfig(router.config.num_heads, shared, heads - len(shared), "linear")
            reallocated.append(_linear_router(config, fit))
        return reallocated

    def refit_outputs(self, routers: Sequence[Router]) -> list[Tensor]:
        """New weights of each layer's output projection."""
        batches = self._batches("refitting the output projections", self._blocks, self._batch_size)
        sums = collect_outputs(self._dense.get_decoder(), self._attentions, routers, batches)
        return [
            refit_output_projection(s, attention.o_proj.weight)
            for s, attention in zip(sums, self._attentions, strict=True)
        ]

    def _batches(self, title: str, blocks: Tensor, batch_size: int) -> Iterator[Tensor]:
        batches = blocks.to(self._dense.device).split(batch_size)
        yield from tqdm(batches, desc=title, unit="batch", disable=not self._progress)


def _linear_router(config: MoHConfig, fit: ContributionFit) -> LinearRouter:
    router = LinearRouter(config, fit.weight.shape[1])
    with torch.no_grad():
        router.contribution.weight.copy_(fit.weight)
        router.contribution.bias.copy_(fit.bias)
    return router


def _two_stage_router(config: MoHConfig, sums: ContributionSums) -> TwoStageRouter:
    router = TwoStageRouter(config, sums.xx.shape[0] - 1)
    with torch.no_grad():
        for undecided in (router.shared, router.stage):  # uniform: every shared head has weight 1, a_1 = a_2
            if undecided is not None:
                undecided.weight.zero_()
        if router.routed is not None:
            router.routed.weight.copy_(fit_two_stage_logits(sums, config.routed_indices))
    return router


def _compact(values: list[Any]) -> Any:
    """One number where all layers have the same number, as a person would write it."""
    return values[0] if isinstance(values[0], int) and len(set(map(str, values))) == 1 else values


def _build(
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
