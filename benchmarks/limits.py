"""The computed limit of a model's case: its ratio to dense if every part were as fast as the dense model's.

Prefill and training are counted in multiplications, decoding in numbers that have to be read. Routing counts as free, and
what a share of the heads does not change (keys, values, MLPs, the output layer) counts in full, so that no implementation
with the dense model's speed per operation can be below it; one that is faster per operation can.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from benchmarks.cases import Case, active_heads

PATCH, CLASSES = 3 * 16 * 16, 1000
"""Numbers of a ViT's patch, and its classes."""

INTERMEDIATE, VOCABULARY = 1536, 49_152
"""Width of the MLPs and number of tokens of SmolLM2-135M."""


def limit(case: Case, share: float) -> float | None:
    """The ratio to dense at a share of the heads; None for other subjects, and where the model's sizes are not at hand.

    Those of a diffusion transformer are in a package that needs diffusers.
    """
    if case.subject == "model" and case.model is None:
        return _cost(case, active_heads(share, case.heads) / case.heads) / _cost(case, 1.0)
    if case.subject == "images" and str(case.model).startswith("vit_"):
        total = case.layers * case.heads  # layers may use one head more or less
        return image_cost(case, round(share * total) / total) / image_cost(case, 1.0)
    if case.subject == "diffusion" and importlib.util.find_spec("diffusers") is not None:
        from moh.models.diffusers.presets import architecture

        dense, ours = (architecture(name) for name in (str(case.model), f"moh_{case.model}_{share * 100:.0f}"))
        return diffusion_cost(ours, case.length) / diffusion_cost(dense, case.length)
    return None


def image_cost(case: Case, used: float) -> float:
    """Multiplications per image of a ViT with a part `used` of the heads."""
    width, tokens = case.heads * case.width, case.length
    by_heads = 2 * width * width + 2 * width * tokens  # q and W_O; q k^T and the sum over values
    others = 2 * width * width + 8 * width * width  # k, v and the MLP
    ends = PATCH * width * (tokens - 1) + width * CLASSES
    return case.layers * tokens * (used * by_heads + others) + ends


def diffusion_cost(sizes: Mapping[str, Any], tokens: int) -> float:
    """Multiplications per image in the blocks of a diffusion transformer, given the arguments that make it."""
    layers, width = sizes["num_layers"], sizes["hidden_size"]

    def per_layer(name: str, default: list[int]) -> list[int]:
        value = sizes.get(name, default)
        return list(value) if isinstance(value, list) else [value] * layers

    heads = per_layer("num_attention_heads", [])
    shared, active = per_layer("shared_heads", heads), per_layer("active_heads", [0] * layers)
    cost = 0.0
    for h, h_s, k in zip(heads, shared, active, strict=True):
        queries = h * sizes["attention_head_dim"]
        by_heads = 2 * width * queries + 2 * queries * tokens
        others = 2 * width * queries + 8 * width * width
        cost += tokens * ((h_s + k) / h * by_heads + others) + 6 * width * width  # and the modulation, of an image
    return cost


def _cost(case: Case, used: float) -> float:
    """Multiplications per token, or numbers read per decoded token, with a part `used` of the heads."""
    width, queries, keys = case.heads * case.width, case.heads * case.width, case.kv_heads * case.width
    by_heads = 2 * width * queries  # q and W_O
    others = 2 * width * keys + 3 * width * INTERMEDIATE  # k, v and the gated MLP
    output = width * VOCABULARY
    if case.mode == "decode":
        # a head's weights are read if any sequence uses it
        weights = by_heads * (1 - (1 - used) ** case.batch) + others
        cache = case.batch * 2 * keys * case.length * _read_caches(case, used)
        return case.layers * (weights + cache) + output
    seen = (case.length + 1) / 2 if case.causal else case.length
    core = 2 * queries * seen  # q k^T and the sum over values
    outputs = output if case.backward else output / case.length  # prefill: of the last token alone
    return case.layers * (used * (by_heads + core) + others) + outputs


def _read_caches(case: Case, used: float) -> float:
    """Expected part of the key/value heads that have an active query head, if tokens choose at random."""
    active, group = round(used * case.heads), case.heads // case.kv_heads
    if case.routing_unit == "kv_group":
        return used
    if case.routing_unit == "group_balanced":
        return 1.0
    unused = 1.0  # probability that none of a group's heads is among the active ones
    for i in range(group):
        unused *= max(0, case.heads - active - i) / (case.heads - i)
    return 1 - unused
