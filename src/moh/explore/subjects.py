"""What is explored: a model, its dial, what it is compared with, and the lock under which one user at a time runs them.

Read from checkpoints in `loading`; what is done with them is in `texts` and `images`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moh.explore.dial import Dial

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reference:
    """What the model is compared with.

    Attributes:
        label: what it is, short.
        note: what has to be known to read the comparison.
        model: the dense model, or the explored one.
        value: of the explored model's dial; None for a model of its own.
    """

    label: str
    note: str
    model: nn.Module
    value: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model to explore.

    Attributes:
        name: of the checkpoint.
        model: in evaluation mode.
        dial: of the model.
        reference: what it is compared with; None if there is nothing.
    """

    name: str
    model: nn.Module
    dial: Dial
    reference: Reference | None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @contextmanager
    def at(self, value: int | None) -> Iterator[float]:
        """The model at a budget, for one user at a time; inside, `reference_at` may be opened in its turn.

        Yields:
            the share of heads that a token uses.

        Raises:
            ValueError: the dial has no such value.
        """
        with self._lock, self.dial.at(value) as share:
            yield share

    @contextmanager
    def reference_at(self) -> Iterator[nn.Module]:
        """Inside `at`: the model to compare with, set to its budget."""
        assert self.reference is not None
        with self.dial.at(self.reference.value):
            yield self.reference.model

    @property
    def facts(self) -> str:
        """In a sentence, what the model is."""
        routers = self.dial.routers
        if not routers:
            return "A dense model: every token uses every head of every layer, and there is no budget to set."
        heads = sorted({router.config.num_heads for router in routers})
        shared = sorted({router.config.num_shared for router in routers})
        kinds = ", ".join(sorted({router.config.router for router in routers}))
        said = f"{len(routers)} MoH layers of {_range(heads)} heads, {_range(shared)} of them shared (router: {kinds})."
        with self.dial.at(None) as share:
            said += f" As saved, a token uses {100 * share:.0f} % of the heads."
        if not self.dial.values:
            said += " Its layers leave no choice of budget."
        return said


@dataclass(frozen=True)
class TextSubject(Subject):
    """A causal language model with its tokenizer; at most `max_tokens` tokens of a text are read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int


@dataclass(frozen=True)
class Eyes:
    """How an image model sees: `transform` makes `[C, H, W]` of an image, `logits` the classes' logits `[K]` of that."""

    transform: Callable[[Image], Tensor]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageSubject(Subject):
    """An image classifier; `classes` are its classes' names, `eyes` its own and `reference_eyes` the reference's."""

    classes: tuple[str, ...]
    eyes: Eyes
    reference_eyes: Eyes


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
