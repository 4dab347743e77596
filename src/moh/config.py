"""What one Mixture-of-Head layer is: its heads, which are shared, how many are routed per token, and by which router.

Plain data without torch; validated once, when it is made. Not for whole models (see `moh.models`).
Names follow the paper (arXiv 2410.11842): h heads, h_s shared, k of the h_r = h - h_s routed ones active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUTERS = ("two_stage", "single_stage", "query_norm", "linear")
"""Names of the routers: learned, the same without its first stage (the paper's ablation), parameter-free (both of the
paper), fitted to contributions (ours)."""


@dataclass(frozen=True)
class MoHConfig:
    """One layer's heads and routing.

    Args:
        num_heads: h, the number of query heads.
        shared_heads: h_s, either a number (the first h_s heads are shared) or the indices of the shared heads.
        active_heads: k, how many of the other, *routed*, heads each token activates.
        router: "two_stage" (learned from scratch), "single_stage" (the same without the weighing of shared against routed
            heads), "query_norm" (no parameters) or "linear" (contribution router).
        scale_gates: for the learned routers only. True gives the published models' gates, with which a uniform
            router weighs every active head 1; False gives the gates as the paper's text has them.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    num_heads: int
    shared_heads: int | Sequence[int]
    active_heads: int
    router: str = "two_stage"
    scale_gates: bool = True

    def __post_init__(self) -> None:
        h = self.num_heads
        if not _is_int(h) or h < 1:
            raise ValueError(f"num_heads must be an integer of at least 1, got {h!r}")
        if _is_int(self.shared_heads):
            if not 0 <= self.shared_heads <= h:  # type: ignore[operator]
                raise ValueError(f"shared_heads must be between 0 and num_heads = {h}, got {self.shared_heads}")
        else:
            object.__setattr__(self, "shared_heads", self._checked_indices(self.shared_heads))
        if not _is_int(self.active_heads) or not 0 <= self.active_heads <= self.num_routed:
            raise ValueError(
                f"active_heads must be between 0 and num_heads - shared_heads = {self.num_routed}, "
                f"got {self.active_heads!r}"
            )
        if self.num_shared + self.active_heads == 0:
            raise ValueError("active_heads must be at least 1 when shared_heads = 0: no head would be used at all")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(map(repr, ROUTERS))}, got {self.router!r}")

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
        return tuple(sorted(indices))

    @property
    def shared_indices(self) -> tuple[int, ...]:
        """Indices of the shared heads, ascending."""
        if isinstance(self.shared_heads, int):
            return tuple(range(self.shared_heads))
        return tuple(self.shared_heads)

    @property
    def routed_indices(self) -> tuple[int, ...]:
        """Indices of the routed heads, ascending."""
        shared = set(self.shared_indices)
        return tuple(i for i in range(self.num_heads) if i not in shared)

    @property
    def num_shared(self) -> int:
        """h_s."""
        return len(self.shared_indices)

    @property
    def num_routed(self) -> int:
        """h_r = h - h_s."""
        return self.num_heads - self.num_shared

    @property
    def share(self) -> float:
        """Share of the layer's heads that each token uses, (h_s + k) / h."""
        return (self.num_shared + self.active_heads) / self.num_heads


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
