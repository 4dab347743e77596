"""Subject `model`: a whole language model of SmolLM2-135M's size: prefill, decoding one token, and a training step.

Random weights and tokens unless a checkpoint is given, which reads text; either way the routers are random, so that tokens
spread over heads about evenly, unless the checkpoint is a MoH model. A training step is forward and backward, without the
optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.cases import Case, Contender, active_heads, ideal_heads
from benchmarks.dense import heads_of, weigh_heads
from benchmarks.limits import INTERMEDIATE, VOCABULARY
from moh.config import MoHConfig
from moh.conversion.transformers import DenseTextModel
from moh.evaluation.speed import cache_of
from moh.models.dial import head_share, set_active_heads
from moh.models.heads import HasLayerHeads
from moh.models.transformers.families import family_of
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.routing import build_router, record_routing

BASE = Case(
    "model", "prefill", heads=9, kv_heads=3, causal=True, router="linear", layers=30, shares=(1 / 3, 2 / 3, 7 / 9, 1.0)
)
TEXTS = Path(__file__).parents[1] / "examples" / "texts"
LONG = (2048, 8192)
"""Tokens of the long texts of the full grid; a training step only at the first, as its logits alone take gigabytes."""

GROUP_UNITS = ("group_balanced", "kv_group")
"""Units with whole groups of heads, or equally many heads in each: at a third and two thirds of the heads."""


def cases(grid: str, checkpoint: str | None = None, dtype: str = "float32") -> list[Case]:
    """The cases of a grid, each once; with a checkpoint, of its size, a MoH model's at its own share and half of the heads."""
    base = replace(BASE if checkpoint is None else _base_of(checkpoint), dtype=dtype)
    if grid == "quick":
        layers = 2 if checkpoint is None else base.layers
        base = replace(base, length=128, layers=layers, shares=base.shares[1:2] or base.shares)
    few = tuple(share for share in base.shares if share >= 0.5 and (checkpoint is not None or share != 7 / 9))
    length = base.length if checkpoint else min(256, base.length)
    training = replace(base, mode="training", length=length, shares=few or base.shares)
    decode = replace(base, mode="decode")
    chosen = [base, decode, training]
    if grid == "default":
        long = replace(decode, length=2048)
        chosen += [long, *_of_units(base), *_of_units(decode), *_of_units(long)]
    if grid == "quick":
        chosen += _of_units(base)
    if grid == "full":
        chosen += [replace(case, length=length) for case in chosen[:2] for length in (128, *LONG)]
        chosen += [replace(training, length=LONG[0])]
        shares = training.shares if checkpoint else (0.5, 7 / 9, 1.0)
        chosen += [
            replace(training, mode="autocast", batch=2, length=length, shares=shares) for length in (512, LONG[0])
        ]
        chosen += [replace(case, batch=8) for case in chosen[:2]]
    return chosen


def _of_units(case: Case) -> list[Case]:
    """One case per unit that chooses by groups; none without groups or for a MoH model, which has its own unit."""
    if case.heads == case.kv_heads or (case.model and isinstance(_config(case.model), HasLayerHeads)):
        return []
    found = []
    for unit in GROUP_UNITS:
        step = MoHConfig(case.heads, 0, case.heads, routing_unit=unit, kv_heads=case.kv_heads).step
        steps = case.heads // step
        few = sorted({min(max(1, round(share * steps)), steps - 1) for share in (1 / 3, 2 / 3)})
        if steps > 1:
            found.append(replace(case, routing_unit=unit, shares=tuple(n / steps for n in few)))
    return found


def _base_of(checkpoint: str) -> Case:
    config = _config(checkpoint)
    shares = (0.25, 0.5, 0.75, 1.0)
    if isinstance(config, HasLayerHeads):
        own = head_share(config.layer_configs())
        shares = (own,) if own <= 0.5 else (0.5, own)
    return replace(
        BASE,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        width=config.head_dim,
        layers=config.num_hidden_layers,
        router=getattr(config, "router", "linear"),
        routing_unit=getattr(config, "routing_unit", "head"),
        model=checkpoint,
        shares=shares,
    )


def contenders(case: Case) -> list[Contender]:
    """Dense and, for each share, ours and the ideal; masked at about half of the heads, or at a unit's largest share."""
    disable_progress_bar()
    moh = case.model is not None and isinstance(_config(case.model), HasLayerHeads)
    models = _at_its_shares(case) if moh else _conversions(case)
    return [Contender(name, _step(model, case), share, actual) for name, model, share, actual in models]


def _at_its_shares(case: Case) -> list[tuple[str, PreTrainedModel, float | None, float | None]]:
    """A MoH model's dense control, and the model at each share, with the share of heads that the case's tokens use."""
    checkpoint = _checkpoint(str(case.model), case.dtype)
    found: list[Any] = [("dense", _without_routers(checkpoint), None, None)]
    for share in case.shares:
        ours = copy.deepcopy(checkpoint)
        if share != head_share(checkpoint.config.layer_configs()):
            set_active_heads(ours, share)
        ours.set_attn_implementation("moh_cpu")
        with torch.no_grad(), record_routing(ours) as routing:
            ours(input_ids=_tokens(ours, case), use_cache=False, logits_to_keep=1)
        used = [float(info.active.float().mean()) for _, info in routing]
        found.append(("ours", ours, share, sum(used) / len(used)))
    return found


def _conversions(case: Case) -> list[tuple[str, PreTrainedModel, float | None, float | None]]:
    H, dense = case.heads, _dense(case)
    masked = 0.5 if case.routing_unit == "head" else max(case.shares)
    weighed = active_heads(masked, H)
    found: list[Any] = [("dense", dense, None, None), ("masked", _masked(dense, weighed, case), masked, weighed / H)]
    for share in case.shares:
        active = active_heads(share, H)
        found.append(("ours", _converted(dense, active, case), share, active / H))
        kept = ideal_heads(share, case)
        if kept is not None:
            found.append(("ideal", _with_heads(dense, *kept), share, kept[0] / H))
    return found


@lru_cache(maxsize=1)
def _checkpoint(path: str, dtype: str) -> PreTrainedModel:
    return load_causal_lm(_resolved(path), dtype=getattr(torch, dtype))


def _config(path: str) -> Any:
    return AutoConfig.from_pretrained(_resolved(path))


def _resolved(path: str) -> str:
    return path if not Path(path).exists() else str(Path(path).resolve())


@lru_cache(maxsize=1)
def _random_model(case: Case) -> PreTrainedModel:
    """A Llama of SmolLM2-135M's size: width 576, 30 layers, 49,152 tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.heads * case.width,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(case.torch_dtype)


def _dense(case: Case) -> PreTrainedModel:
    if case.model is not None:
        return _checkpoint(case.model, case.dtype)
    sizes = dict(heads=case.heads, kv_heads=case.kv_heads, layers=case.layers, dtype=case.dtype)
    return _random_model(Case("model", "", **sizes))  # type: ignore[arg-type]


def _layer(active: int, case: Case) -> MoHConfig:
    return heads_of(active, case.heads, case.router or "", routing_unit=case.routing_unit, kv_heads=case.kv_heads)


def _converted(dense: PreTrainedModel, active: int, case: Case) -> PreTrainedModel:
    """The MoH model on the dense one's own tensors, with random routers."""
    layers = [_layer(active, case)] * dense.config.num_hidden_layers
    routers = [build_router(layer, dense.config.hidden_size) for layer in layers]
    adapter = DenseTextModel(dense, layers[0].router, copied=False)
    model: PreTrainedModel = adapter.build(layers, routers, [], router_aux_loss_coef=0.0).to(dense.dtype)
    model.set_attn_implementation("moh_cpu")
    return model


def _with_heads(dense: PreTrainedModel, heads: int, kv_heads: int) -> PreTrainedModel:
    """The dense model with only the first query heads, on the same tensors where they have the same size."""
    config = type(dense.config)(**{**dense.config.to_dict(), "num_attention_heads": heads, "head_dim": _width(dense)})
    config.num_key_value_heads = kv_heads
    width = heads * _width(dense)
    state = dense.state_dict()
    for name in state:
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            state[name] = state[name][:width].contiguous()
        elif name.endswith("o_proj.weight"):
            state[name] = state[name][:, :width].contiguous()
        elif heads == kv_heads and ("k_proj" in name or "v_proj" in name):
            state[name] = state[name][: kv_heads * _width(dense)].contiguous()
    return _from_state(type(dense), config, state, dense)


def _without_routers(moh: PreTrainedModel) -> PreTrainedModel:
    """The dense model with a MoH model's weights."""
    state = {name: tensor for name, tensor in moh.state_dict().items() if ".router." not in name}
    family = family_of(moh.config.model_type)
    assert family is not None
    kind = getattr(transformers, family.models["AutoModelForCausalLM"])
    known = kind.config_class().to_dict()
    fields = {name: value for name, value in moh.config.to_dict().items() if name in known and name != "model_type"}
    return _from_state(kind, kind.config_class(**fields), state, moh)


def _from_state(
    kind: type[PreTrainedModel], config: Any, state: dict[str, Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=like.dtype, attn_implementation="sdpa"
    )
    return model


def _width(dense: PreTrainedModel) -> int:
    width: int = dense.model.layers[0].self_attn.head_dim
    return width


def _masked(dense: PreTrainedModel, active: int, case: Case) -> PreTrainedModel:
    """The dense model, each head's output weighted by a router's gate before the output projection."""
    model = _from_state(type(dense), dense.config, dense.state_dict(), dense)
    layer = _layer(active, case)
    for block in model.model.layers:
        weigh_heads(block.self_attn, block.self_attn.o_proj, build_router(layer, dense.config.hidden_size))
    return model


def _tokens(model: PreTrainedModel, case: Case) -> Tensor:
    """Token ids `[B, N]`: random for random weights; a checkpoint's routers choose by text, repeated where it is short."""
    if case.model is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (case.batch, case.length), generator=generator)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(TEXTS.glob("*.txt")))
    ids: Tensor = load_tokenizer(_resolved(case.model))(text, return_tensors="pt").input_ids[0]
    wanted = case.batch * case.length
    return ids.repeat(-(-wanted // len(ids)))[:wanted].view(case.batch, case.length)


def _step(model: PreTrainedModel, case: Case) -> Callable[[], object]:
    model.train(case.backward)
    tokens = _tokens(model, case)
    if case.backward:

        def train() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.mode == "autocast"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            model.zero_grad()

        return train
    if case.mode == "prefill":  # as in `generate`: logits of only the last token
        return lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    cache: list[dict[str, Any]] = []

    def decode() -> None:
        if not cache:
            cache.append(cache_of(model(input_ids=tokens, use_cache=True, logits_to_keep=1)))
        # The cache grows as in generation, by tens of tokens in total
        model(input_ids=tokens[:, -1:], **cache[0], use_cache=True)

    return decode
