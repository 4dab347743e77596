"""What the conversion needs to know of a dense model, whatever its family: one adapter a family fills this in.

Not for the calibration itself (`moh.conversion.calibrator`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moh.config import MoHConfig
from moh.routing import Router


@dataclass(frozen=True)
class DenseAttention:
    """One attention layer as the calibration sees it.

    Attributes:
        entry: the projection of the queries, alone or with others: what it reads is the layer's input `[B, N, C]`.
        output: the output projection W_O, linear: what it reads is the heads, concatenated, `[B, N, H*D]`.
        scale: `[C]`, what the layer's output is multiplied by on its way into the residual stream; None for nothing.
    """

    entry: nn.Module
    output: nn.Module
    scale: Tensor | None = None

    @property
    def width(self) -> int:
        """C, the width of the layer's input."""
        return int(self.entry.nx if isinstance(self.entry, Conv1D) else self.entry.in_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.output.weight.device  # type: ignore[return-value]

    @property
    def output_weight(self) -> Tensor:
        """`[C, H*D]`, W_O transposed, as a linear layer keeps it."""
        weight: Any = self.output.weight
        return weight.T if isinstance(self.output, Conv1D) else weight  # type: ignore[no-any-return]

    @property
    def written(self) -> Tensor:
        """`[C, H*D]`, how heads reach the residual stream: W_O transposed, with the layer's scale."""
        weight = self.output_weight.detach()
        return weight if self.scale is None else weight * self.scale.detach()[:, None]


class DenseModel(ABC):
    """A dense model and how it is run, judged and rebuilt with MoH attention.

    Attributes:
        model: the model, which is left as it is.
        attentions: its attention layers, in order.
        num_heads: h of every layer.
        kv_heads: key/value heads of every layer, each read by a group of heads; None where it is not known.
    """

    model: nn.Module
    attentions: list[DenseAttention]
    num_heads: int
    kv_heads: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model reads its samples."""
        return self.attentions[0].device

    @abstractmethod
    def needs_calibration(self, router: str) -> bool:
        """Whether a router of this kind has to be fitted."""

    def refusal(self, *, router: str, refit_output: bool, router_aux_loss_coef: float) -> str | None:
        """Why this model can't have what is asked for, and what works; None if it can."""
        return None

    @abstractmethod
    def samples(self, calibration: Any, *, max_tokens: int, tokenizer: Any, seq_len: int | None) -> Tensor:
        """Calibration data `[n, ...]` that the model reads, at most `max_tokens` tokens of it.

        Args:
            calibration: as `moh.convert` takes it.
            max_tokens: upper bound, at least one sample.
            tokenizer: for texts; None for other data.
            seq_len: length of blocks of texts; None for the default and for other data.

        Raises:
            ValueError: `calibration` is not what the model reads.
        """

    @abstractmethod
    def tokens_per_sample(self, samples: Tensor) -> int:
        """N, how many tokens the model makes of each of `samples`."""

    @abstractmethod
    def run(self, samples: Tensor) -> None:
        """One forward pass over `samples`, without a head where that saves time."""

    @abstractmethod
    def loss(self, samples: Tensor) -> Tensor:
        """Sum of the losses over `samples`, with a graph through every layer though no parameter asks for gradients.

        Raises:
            ValueError: the model has no loss; says what to do.
        """

    @abstractmethod
    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[Tensor],
        *,
        router_aux_loss_coef: float,
    ) -> nn.Module:
        """The MoH model, in evaluation mode.

        Args:
            layers: heads and routing of each layer.
            routers: fitted routers, one per layer; empty where routers have no parameters.
            output_weights: refitted weights of the output projections; empty to keep the dense ones.
        """
