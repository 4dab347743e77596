"""What one Mixture-of-Head layer is: its heads, which are shared, how many are routed per token, and by which router.

Plain data without torch; validated once, when it is made.
Names follow the paper (arXiv 2410.11842): h heads, h_s shared, k of the h_r = h - h_s routed ones active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

ROUTERS = ("two_stage", "single_stage", "query_norm", "query_norm_rounded", "linear", "threshold")
"""Names of the routers: the paper's (learned, its ablation without the first stage, parameter-free, the same as its published
code rounds it), and ours, fitted to contributions."""

FIXED = "fixed"
"""The name of no routing: every token uses the layer's shared heads, and its other heads do not exist."""

ROUTING_UNITS = ("head", "group_balanced", "kv_group")
"""What a token chooses: any heads; the same number in every group that shares keys and values; or whole such groups."""


@dataclass(frozen=True)
class MoHConfig:
    """One layer's heads and routing.

    Args:
        num_heads: h, the number of query heads.
        shared_heads: h_s, either a number (the first h_s heads are shared) or the indices of the shared heads.
        active_heads: k, how many of the other, *routed*, heads each token activates.
        router: "two_stage" (learned from scratch), "single_stage" (the same without the weighing of shared against routed
            heads), "query_norm" (no parameters), "query_norm_rounded" (the same, rounded as published), "linear" (contribution
            router) or "threshold" (the same, but k is an average: a token's routed heads are those whose contribution is
            above a threshold); or "fixed", where nothing is routed: a layer is its shared heads, which may be none, and k
            is 0.
        routing_unit: what a token chooses. "head": any k routed heads (the paper). "group_balanced": with grouped-query
            attention, k / kv_heads of the routed heads in every group of heads that share keys and values; all
            groups have the same number of shared heads. "kv_group": whole groups, k * kv_heads / h of them; shared
            heads are whole groups too.
        thresholds: of router="threshold", for each k from 0 to h_r what a routed head's score has to exceed where tokens use k
            routed heads on average; None until the conversion has fitted them.
        kv_heads: number of key/value heads, required by the two units with groups; query head i reads key/value head
            `i // (h / kv_heads)`.

    With `shared_heads` as a number a group-balanced layer shares the first heads of every group.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what is allowed.
    """

    num_heads: int
    shared_heads: int | Sequence[int]
    active_heads: int
    router: str = "two_stage"
    routing_unit: str = "head"
    kv_heads: int | None = None
    thresholds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        h = self.num_heads
        if not _is_int(h) or h < 1:
            raise ValueError(f"num_heads must be an integer of at least 1, got {h!r}")
        self._check_unit()
        if _is_int(self.shared_heads):
            if not 0 <= self.shared_heads <= h:  # type: ignore[operator]
                raise ValueError(f"shared_heads must be between 0 and num_heads = {h}, got {self.shared_heads}")
            self._check_multiple("shared_heads", self.shared_heads)  # type: ignore[arg-type]
        else:
            object.__setattr__(self, "shared_heads", self._checked_indices(self.shared_heads))
        if self.router == FIXED and self.active_heads != 0:
            raise ValueError(
                f"active_heads must be 0 for router={FIXED!r}, whose layers have their shared heads alone, got "
                f"{self.active_heads!r}"
            )
        if not _is_int(self.active_heads):
            raise ValueError(f"active_heads must be an integer, got {self.active_heads!r}")
        if not 0 <= self.active_heads <= self.num_routed:
            raise ValueError(
                f"active_heads must be between 0 and num_heads - shared_heads = {self.num_routed}, "
                f"got {self.active_heads!r}"
            )
        self._check_multiple("active_heads", self.active_heads)
        if self.num_shared + self.active_heads == 0 and self.router != FIXED:
            raise ValueError("active_heads must be at least 1 when shared_heads = 0: no head would be used at all")
        if self.router not in (*ROUTERS, FIXED):
            raise ValueError(f"router must be one of {', '.join(map(repr, (*ROUTERS, FIXED)))}, got {self.router!r}")

        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", self._checked_thresholds(self.thresholds))

    def _checked_thresholds(self, values: object) -> tuple[float, ...]:
        if self.router != "threshold":
            raise ValueError(f"thresholds must be None for router={self.router!r}, got {values!r}")
        numbers = values if isinstance(values, Sequence) and not isinstance(values, str) else ()
        if len(numbers) != self.num_routed + 1 or not all(isinstance(n, int | float) and isfinite(n) for n in numbers):
            raise ValueError(
                f"thresholds must hold {self.num_routed + 1} numbers, one for each number of routed heads from 0 to "
                f"{self.num_routed}, as fitted for these shared heads, got {values!r}"
            )
        return tuple(map(float, numbers))

    def _check_unit(self) -> None:
        if self.routing_unit not in ROUTING_UNITS:
            raise ValueError(
                f"routing_unit must be one of {', '.join(map(repr, ROUTING_UNITS))}, got {self.routing_unit!r}"
            )
        if self.router == "threshold" and self.routing_unit != "head":
            raise ValueError(
                "routing_unit must be 'head' for router='threshold', whose tokens use different numbers of heads, got "
                f"{self.routing_unit!r}"
            )
        groups = self.kv_heads
        if groups is None and self.routing_unit != "head":
            raise ValueError(f"kv_heads must be given for routing_unit={self.routing_unit!r}")
        if groups is not None and (not _is_int(groups) or groups < 1 or self.num_heads % groups):
            raise ValueError(f"kv_heads must divide num_heads = {self.num_heads}, got {groups!r}")

    def _check_multiple(self, name: str, number: int) -> None:
        if number % self.step:
            of = "kv_heads" if self.routing_unit == "group_balanced" else "num_heads / kv_heads"
            raise ValueError(
                f"{name} must be a multiple of {of} = {self.step} for routing_unit={self.routing_unit!r}, got {number}"
            )

    def _checked_indices(self, indices: object) -> tuple[int, ...]:
        if isinstance(indices, str) or not isinstance(indices, Sequence) or not all(map(_is_int, indices)):
            raise ValueError(f"shared_heads must be a number of heads or a sequence of head indices, got {indices!r}")
        if len(set(indices)) != len(indices):
            raise ValueError(f"shared_heads must not name a head twice, got {list(indices)}")
        if any(not 0 <= i < self.num_heads for i in indices):
            raise ValueError(
                f"shared_heads must hold indices between 0 and num_heads - 1 = {self.num_heads - 1}, "
                f"got {list(indices)}"
            )
        if self.routing_unit != "head" and self.kv_heads is not None:
            size = self.num_heads // self.kv_heads
            counts = [sum(i // size == group for i in indices) for group in range(self.kv_heads)]
            balanced = self.routing_unit == "group_balanced"
            if len(set(counts)) > 1 if balanced else not set(counts) <= {0, size}:
                what = f"equally many heads of every group of {size}" if balanced else f"whole groups of {size} heads"
                raise ValueError(
                    f"shared_heads must hold {what} for routing_unit={self.routing_unit!r}, got {list(indices)}"
                )
        return tuple(sorted(indices))

    @property
    def shared_indices(self) -> tuple[int, ...]:
        """Indices of the shared heads, ascending."""
        if not isinstance(self.shared_heads, int):
            return tuple(self.shared_heads)
        if self.routing_unit == "group_balanced" and self.kv_heads is not None:
            size, per_group = self.num_heads // self.kv_heads, self.shared_heads // self.kv_heads
            return tuple(i for i in range(self.num_heads) if i % size < per_group)
        return tuple(range(self.shared_heads))

    @property
    def routed_indices(self) -> tuple[int, ...]:
        """Indices of the routed heads, ascending; none where the heads are fixed."""
        if self.router == FIXED:
            return ()
        shared = set(self.shared_indices)
        return tuple(i for i in range(self.num_heads) if i not in shared)

    @property
    def num_shared(self) -> int:
        """h_s."""
        return len(self.shared_indices)

    @property
    def num_routed(self) -> int:
        """h_r = h - h_s; 0 where the heads are fixed."""
        return 0 if self.router == FIXED else self.num_heads - self.num_shared

    @property
    def share(self) -> float:
        """Share of the layer's heads that each token uses, (h_s + k) / h; an average with the router `threshold`."""
        return (self.num_shared + self.active_heads) / self.num_heads

    @property
    def step(self) -> int:
        """The numbers of shared and of active heads are multiples of this; 1 if single heads are chosen."""
        if self.routing_unit == "head" or self.kv_heads is None:
            return 1
        return self.kv_heads if self.routing_unit == "group_balanced" else self.num_heads // self.kv_heads

    @property
    def heads_per_group(self) -> int | None:
        """How many heads each token uses in every key/value group; None where it differs."""
        if self.routing_unit != "group_balanced" or self.kv_heads is None:
            return None
        return (self.num_shared + self.active_heads) // self.kv_heads or None  # a layer without heads promises nothing


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
