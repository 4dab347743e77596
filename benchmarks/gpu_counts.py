"""`python -m benchmarks.gpu_counts`: the counts that choose a GPU's projections, as the tables of docs/gpu.md.

Counts operations and numbers read, without a GPU; `python -m benchmarks --device cuda` measures time.
"""

from __future__ import annotations

import torch

from moh.attention.gpu.projections import dense_is_faster
from moh.attention.gpu.tiles import relative_cost

WIDTHS = (64, 72, 80, 96, 128, 256)
LENGTHS = (2048, 8192)
HEADS, KV_HEADS, WIDTH, SHARE = 32, 8, 128, 0.5
TOKENS, CHANNELS = 8192, 4096
MAJOR = 9
"""Compute capability 9.0; the others have tiles as tall and as wide."""

LINEAR_BACKWARD = 2.0
"""Products in a linear layer's backward pass per product of its forward pass: for its input and for its weight."""

ATTENTION_BACKWARD = 2.5
"""The same for attention: scores again, and the gradients of queries, keys, values and weights, per scores and sums."""


def largest_share(width: int) -> float:
    """The largest share of heads, in whole percents, at which heads of this width get sparse projections; 0 if none."""
    heads = CHANNELS // width
    shares = (percent / 100 for percent in range(100, 0, -1))
    return next((share for share in shares if _is_chosen(share, heads, width)), 0.0)


def _is_chosen(share: float, heads: int, width: int) -> bool:
    reason = dense_is_faster(
        tokens=TOKENS,
        heads=heads,
        width=width,
        channels=CHANNELS,
        share=share,
        dtype=torch.bfloat16,
        major=MAJOR,
    )
    return reason is None


def layer_operations(length: int, *, attention: float, sparse: bool, backward: bool) -> float:
    """Operations of a causal layer per token, see docs/method.md, section 10.

    Args:
        length: N, tokens of a sequence.
        attention: share of attention's pairs that are computed.
        sparse: whether projections leave out inactive heads, where the kernels do.
        backward: whether the backward pass is counted too.
    """
    queries = output = 2 * CHANNELS * HEADS * WIDTH
    keys_and_values = 4 * CHANNELS * KV_HEADS * WIDTH
    core = attention * 4 * (length / 2) * HEADS * WIDTH
    share = SHARE if sparse else 1.0
    forward = share * queries + output + keys_and_values + core
    if not backward:
        return forward
    # In the backward pass, the sum over heads for the gradient of the queries' input stays dense; the gradients of both
    # weights and of the heads fall.
    of_queries, of_output = (1 + share) * queries, 2 * share * output
    return forward + of_queries + of_output + LINEAR_BACKWARD * keys_and_values + ATTENTION_BACKWARD * core


def tables() -> str:
    """Both tables of docs/gpu.md, in Markdown."""
    costs = (f"{relative_cost(width, MAJOR):.2f}" for width in WIDTHS)
    shares = (f"{largest_share(width):.0%}".replace("%", " %") for width in WIDTHS)
    lines = [
        _row("width of a head", *map(str, WIDTHS)),
        _row(*["---"] * (len(WIDTHS) + 1)),
        _row("cost of a pair by count", *costs),
        _row(f"largest share of heads, {TOKENS:,} tokens", *shares),
        "",
        _row("", *(f"N = {length:,}" for length in LENGTHS)).replace("|  |", "| |"),
        _row(*["---"] * (len(LENGTHS) + 1)),
    ]
    for backward, what in ((False, "forward"), (True, "forward + backward")):
        for sparse in (False, True):
            words = "dense projections" if not sparse else f"{'projections' if backward else 'queries'} of active heads"
            lines.append(_row(f"{what}, {words}", *(f"{_ratio(n, sparse, backward):.2f}" for n in LENGTHS)))
    return "\n".join(lines)


def _ratio(length: int, sparse: bool, backward: bool) -> float:
    ours = layer_operations(length, attention=SHARE, sparse=sparse, backward=backward)
    return ours / layer_operations(length, attention=1.0, sparse=False, backward=backward)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(tables())
