"""The cases, one `Case` per row of the results, with their contenders and gates.

Pure description and input tensors; `timing` measures, the subjects (`core`, `decode`, ...) say what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Default shares of active heads of every subject."""

GRIDS = ("quick", "default", "full")


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Attributes:
        subject: name of the module that measures it.
        mode: "forward", "forward+backward", "prefill", "decode", "training" or "autocast": a training step under autocast to
            bfloat16.
        batch: B.
        heads: H, query heads.
        kv_heads: key/value heads; fewer than `heads` is grouped-query attention.
        length: N, tokens; when decoding, tokens in the cache.
        width: D, of one head.
        dtype: name of a torch dtype.
        causal: whether a token sees only those before it.
        router: of layers and models; None where gates are drawn at random.
        routing_unit: what a token chooses, `moh.config.ROUTING_UNITS`; other than "head" only in language models.
        layers: of models.
        model: a model's checkpoint, None for random weights.
        shares: shares of active heads, see `active_heads`.
    """

    subject: str
    mode: str
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    length: int = 512
    width: int = 64
    dtype: str = "float32"
    causal: bool = False
    router: str | None = None
    routing_unit: str = "head"
    layers: int = 1
    model: str | None = None
    shares: tuple[float, ...] = SHARES

    @property
    def key(self) -> str:
        """Identifies the case in the results."""
        return f"{self.subject} {self.mode} {self.label}"

    @property
    def label(self) -> str:
        """The sizes in words, as in the tables."""
        heads = f"H{self.heads}" if self.kv_heads == self.heads else f"H{self.heads}/{self.kv_heads}"
        extras = [
            "causal" if self.causal else "",
            self.router or "",
            "" if self.routing_unit == "head" else self.routing_unit,
            f"{self.layers} layers" if self.layers > 1 else "",
        ]
        words = [
            f"B{self.batch}",
            heads,
            f"N{self.length}",
            f"D{self.width}",
            self.dtype,
            *extras,
            PurePath(self.model or "").name,
        ]
        return " ".join(filter(None, words))

    @property
    def backward(self) -> bool:
        """Whether gradients are computed too."""
        return self.mode in ("forward+backward", "training", "autocast")

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def pairs(self) -> int:
        """Products of a query and a key, all heads: dense attention's time is proportional to them."""
        queries = 1 if self.mode == "decode" else self.length
        return self.batch * self.heads * queries * self.length * (3 if self.backward else 1)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        """The case whose `dataclasses.asdict`, through JSON, is `fields`."""
        return cls(**(fields | {"shares": tuple(fields["shares"])}))


def vary(base: Case, **axes: tuple[object, ...]) -> list[Case]:
    """The base with one field changed at a time: a cross through it, not a grid."""
    return [replace(base, **{name: value}) for name, values in axes.items() for value in values]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: "dense" (PyTorch's attention, all heads), "ours", "ours (sdpa)", "ideal" (a model that has only the
            active heads), "masked" (dense, then weighted by the gates: the authors' code) or "routing" (router alone).
        run: does it once.
        share: asked-for share of active heads, None if all are computed without gates.
        actual: the share with a whole number of heads.
    """

    name: str
    run: Callable[[], object]
    share: float | None = None
    actual: float | None = None


def active_heads(share: float, heads: int) -> int:
    """Whole number of heads nearest to the share, at least 1."""
    return max(1, round(share * heads))


def ideal_heads(share: float, case: Case) -> tuple[int, int] | None:
    """(query heads, key/value heads) of the dense model with only the active heads; groups get smaller, not fewer.

    None if all are active, or if they can't be distributed to the groups evenly.
    """
    k = active_heads(share, case.heads)
    if k == case.heads:
        return None
    if case.kv_heads == case.heads:
        return k, k
    return None if k % case.kv_heads else (k, case.kv_heads)


def balanced_gates(batch: int, length: int, heads: int, active: int, *, seed: int = 0) -> Tensor:
    """Gates `[B, N, H]` of 1 and 0: `active` heads per token, drawn at random, every head equally often.

    In each block of H tokens the j-th takes `active` neighbours, from place j on, in a random circle of the heads; then
    the tokens are shuffled. Each head gets exactly `active` tokens of a block (the last block may be cut short).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-length // heads)
    circle = torch.rand(batch, blocks, heads, generator=generator).argsort(-1)  # [B, blocks, H]
    place = (torch.arange(heads)[:, None] + torch.arange(active)) % heads  # [H, active]
    chosen = circle[..., place].reshape(batch, blocks * heads, active)[:, :length]
    order = torch.rand(batch, length, generator=generator).argsort(-1)  # [B, N]
    chosen = chosen.gather(1, order[..., None].expand(-1, -1, active))
    return torch.zeros(batch, length, heads).scatter(-1, chosen, 1.0)


def in_turn(choices: list[Tensor]) -> Iterator[Tensor]:
    """The choices, repeated endlessly."""
    while True:
        yield from choices
