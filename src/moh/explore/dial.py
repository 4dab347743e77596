"""One number for the budget of a whole model: which values the slider takes, and the model at one of them.

Over `moh.models.dial`, which sets each layer. Not locked: `moh.explore.subjects` sees to one user at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moh.models.dial import active_heads, allowed_counts, head_share, moh_routers
from moh.routing import Router


class Dial:
    """Routed heads active per token, as one number for all layers of a model.

    In a layer that has fewer choices than others (fewer heads, or routing by groups) the number stands for the choice
    in proportion. Where the conversion has saved what each layer's heads are worth (`config.head_costs`), the number is
    the mean over the layers, handed out by those costs.

    Args:
        model: MoH or dense.

    Attributes:
        values: what the dial can be set to, ascending; empty for a dense model and one whose layers leave no choice.
        own: the value that gives the model's own budget; None if none does, as where layers were set one by one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers = moh_routers(model) if any(isinstance(m, Router) for m in model.modules()) else []
        self._choices = [allowed_counts(router) for router in self.routers]
        longest: list[int] = max(self._choices, key=len, default=[])
        self.values = tuple(longest) if len(longest) > 1 else ()
        self.by_cost = any(getattr(getattr(m, "config", None), "head_costs", None) for m in model.modules())
        own = self.counts()
        self.own = next((value for value in self.values if self._counts_at(value) == own), None)

    def counts(self) -> list[int]:
        """Routed heads active per token in each MoH layer, as the model is set now."""
        return [router.config.active_heads for router in self.routers]

    @property
    def uses_all(self) -> bool:
        """Whether the dial's last value makes every token use every head, each with the weight 1."""
        hard = all(router.is_hard for router in self.routers)
        most = [choices[-1] for choices in self._choices]
        return hard and bool(self.values) and most == [router.config.num_routed for router in self.routers]

    @contextmanager
    def at(self, value: int | None) -> Iterator[float]:
        """Inside the block the model has this budget.

        Args:
            value: one of `values`; None leaves the model's own.

        Yields:
            share of the heads that a token uses, over all MoH layers; 1 for a dense model.

        Raises:
            ValueError: `value` is none of `values`.
        """
        if value is None:
            yield head_share([router.config for router in self.routers]) if self.routers else 1.0
            return
        with active_heads(self.model, self._setting(value)) as share:
            yield share

    def _setting(self, value: int) -> list[int] | float:
        if value not in self.values:
            allowed = f"one of {', '.join(map(str, self.values))}" if self.values else "left out for this model"
            raise ValueError(f"active heads must be {allowed}, got {value}")
        place, last = self.values.index(value), len(self.values) - 1
        counts = [choices[round(place * (len(choices) - 1) / last)] for choices in self._choices]
        if not self.by_cost:
            return counts
        used = sum(router.config.num_shared + n for router, n in zip(self.routers, counts, strict=True))
        return used / sum(router.config.num_heads for router in self.routers)

    def _counts_at(self, value: int) -> list[int]:
        with self.at(value):
            return self.counts()
