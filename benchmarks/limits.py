"""The computed limit of a language model's case: its ratio to dense if every part were as fast as the dense model's.

Prefill and training are counted in multiplications, decoding in numbers that have to be read. Routing counts as free, and
what a share of the heads does not change (keys, values, MLPs, the output layer) counts in full, so that no implementation
with the dense model's speed per operation can be below it; one that is faster per operation can.
"""

from __future__ import annotations

from benchmarks.cases import Case, active_heads

INTERMEDIATE, VOCABULARY = 1536, 49_152
"""Width of the MLPs and number of tokens of SmolLM2-135M."""


def limit(case: Case, share: float) -> float | None:
    """The ratio to dense at a share of the heads; None for other subjects, and for checkpoints, whose sizes a case lacks."""
    if case.subject != "model" or case.model is not None:
        return None
    used = active_heads(share, case.heads) / case.heads
    return _cost(case, used) / _cost(case, 1.0)


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
    outputs = output if case.mode == "training" else output / case.length  # prefill: of the last token alone
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
