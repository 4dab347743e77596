"""What the conversion needs to know of a dense model: the interface that the adapter of each kind of model implements.

`DenseImageModel` is what the adapters of image models share: calibration images, a loss without labels, unfitted routers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moh._modes import evaluating
from moh.config import MoHConfig
from moh.data.text.blocks import evenly_spread
from moh.routing import Router, router_class

UNDECIDED = 1e-6
"""Standard deviation of an unfitted router's logits: tokens differ in their heads, and every gate is 1 up to this."""


@dataclass(frozen=True)
class DenseAttention:
    """One attention layer as the calibration sees it.

    Attributes:
        entry: the projection of the queries, alone or fused; it reads the layer's input `[B, N, C]`.
        output: the output projection W_O, linear; it reads the heads, concatenated, `[B, N, H*D]`.
        scale: `[C]`, factor of the layer's output on its way into the residual stream; None for none.
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


class OutputWeight(NamedTuple):
    """What a converted layer's output projection holds.

    Attributes:
        weight: W_O transposed `[C, heads * D]`; of a layer without heads the map of its input, `[C, C]`, or None.
        bias: `[C]`, which is added to the dense one's; None for none.
    """

    weight: Tensor | None
    bias: Tensor | None = None


class DenseModel(ABC):
    """A dense model and how it is run, judged and rebuilt with MoH attention.

    Attributes:
        model: the model, which is left as it is.
        attentions: its attention layers, in order.
        num_heads: h of every layer.
        kv_heads: key/value heads of every layer, each read by a group of heads; None if unknown.
        blocks: all layers, of which attention is a part or, in a hybrid model, of some of them; a graph for gradients keeps
            their inputs alone. Empty if they aren't known.
    """

    model: nn.Module
    attentions: list[DenseAttention]
    num_heads: int
    kv_heads: int | None = None
    blocks: Sequence[nn.Module] = ()

    @property
    def device(self) -> torch.device:
        """Where the model reads its samples."""
        return self.attentions[0].device

    @abstractmethod
    def needs_calibration(self, router: str) -> bool:
        """Whether a router of this kind has to be fitted."""

    def refusal(self, *, router: str, refit_output: bool, router_aux_loss_coef: float) -> str | None:
        """Why this model can't have what is requested, and what works; None if it can."""
        return None

    @abstractmethod
    def samples(
        self, calibration: Any, *, max_tokens: int, tokenizer: Any, seq_len: int | Sequence[int] | None
    ) -> Sequence[Tensor]:
        """Calibration data `[n, ...]` that the model reads, of each length; at most `max_tokens` tokens of it in all.

        Args:
            calibration: as `moh.convert` takes it.
            max_tokens: upper bound, at least one sample.
            tokenizer: for texts; None for other data.
            seq_len: length of blocks of texts, or several; None for the default and for other data.

        Raises:
            ValueError: `calibration` is not what the model reads.
        """

    @abstractmethod
    def tokens_per_sample(self, samples: Tensor) -> int:
        """N, how many tokens the model makes of each of `samples`."""

    @abstractmethod
    def run(self, samples: Tensor) -> Tensor | None:
        """One forward pass over `samples`, without a head where that saves time; its output, to see that it is finite."""

    @abstractmethod
    def loss(self, samples: Tensor) -> Tensor:
        """Sum of the losses over `samples`, with a graph through every layer though no parameter requires gradients.

        At most `samples_per_loss` of them at once: the graph takes memory.

        Raises:
            ValueError: the model has no loss; the message states what to do.
        """

    def loss_behind(self, samples: Tensor, places: Tensor) -> Tensor:
        """The loss of the tokens behind `places` `[P]` alone, as `loss`; of language models that generate."""
        raise NotImplementedError(f"a {type(self.model).__name__} writes no tokens")

    def samples_per_loss(self, batch_size: int) -> int:
        """How many samples one loss is of, where a forward pass alone takes `batch_size`."""
        return max(1, batch_size // 2)

    @abstractmethod
    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[OutputWeight],
        *,
        router_aux_loss_coef: float,
    ) -> nn.Module:
        """The MoH model, in evaluation mode.

        Args:
            layers: heads and routing of each layer.
            routers: fitted routers, one per layer; empty where routers have no parameters.
            output_weights: of the output projections, one per layer; empty to keep the dense ones.
        """


class DenseImageModel(DenseModel):
    """A dense model that reads images `[B, C, H, W]`."""

    def needs_calibration(self, router: str) -> bool:
        return router_class(router).needs_fit

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor | None:
        """`[B, classes]`, or None if the model has no classifier."""

    def run(self, samples: Tensor) -> Tensor | None:
        return self.logits(samples)

    def samples(
        self, calibration: Any, *, max_tokens: int, tokenizer: Any, seq_len: int | Sequence[int] | None
    ) -> list[Tensor]:
        """Images `[n, C, H, W]` in the model's dtype, spread evenly over a tensor, or the first ones of batches."""
        if tokenizer is not None or seq_len is not None:
            raise ValueError("tokenizer and seq_len are for language models: calibration is images here")
        if max_tokens < 1:
            raise ValueError(f"calibration_tokens must be at least 1, got {max_tokens}")
        dtype = self.attentions[0].output_weight.dtype
        if isinstance(calibration, Tensor):
            images = _checked(calibration)
            count = self._images_for(max_tokens, images)
            return [evenly_spread(images, count).to(dtype)]
        batches = _batches(calibration)
        found = [_checked(next(batches, None))]
        count = self._images_for(max_tokens, found[0])
        while sum(map(len, found)) < count and (batch := next(batches, None)) is not None:
            found.append(_checked(batch))
        if len({images.shape[1:] for images in found}) > 1:
            raise ValueError(
                f"calibration must hold images of one size, got {sorted({tuple(i.shape[1:]) for i in found})}"
            )
        return [torch.cat(found)[:count].to(dtype)]

    def _images_for(self, max_tokens: int, images: Tensor) -> int:
        return max(1, max_tokens // self.tokens_per_sample(images))

    def tokens_per_sample(self, samples: Tensor) -> int:
        """N, seen in a forward pass of one image."""
        seen: list[int] = []
        handle = self.attentions[0].entry.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
        try:
            with torch.no_grad(), evaluating(self.model):
                self.logits(samples[:1].to(self.device, self.attentions[0].output_weight.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"calibration must be images that the model can read, got {tuple(samples.shape)}: {error}"
            ) from None
        finally:
            handle.remove()
        return seen[0]

    def loss(self, samples: Tensor) -> Tensor:
        """Cross-entropy with labels drawn from the model's own predictions.

        Its squared gradients are, on average, the model's Fisher information, for which no true labels are needed.
        """
        logits = self.logits(samples.detach().requires_grad_())
        if logits is None:
            raise ValueError(
                "allocation='sensitivity' needs a classifier, whose loss shows what a layer needs; this model has none: "
                "convert the classifier that was trained on it, or use allocation='even'"
            )
        check_finite(logits, f"layer {len(self.attentions) - 1} gives")
        probs = logits.detach().float().softmax(-1).cpu()
        labels = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
        return nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse what the calibration shows if it is NaN or infinity, from which nothing can be fitted.

    Args:
        tensor: what was seen.
        what: begins the message, such as "layer 3 gives".

    Raises:
        ValueError: it isn't finite; says what to do.
    """
    if not bool(tensor.isfinite().all()):
        advice = (
            "its weights or the calibration must be damaged"
            if tensor.dtype in (torch.float32, torch.float64)
            else "load the model in float32 and convert that"
        )
        raise ValueError(f"{what} NaN or infinity on the calibration data, computed in {tensor.dtype}: {advice}")


def check_weights(model: nn.Module) -> None:
    """Refuse a model that is damaged.

    Raises:
        ValueError: a parameter isn't finite; names it, its layer and what to do.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not _is_finite(parameter.detach()):
            numbers = [part for part in name.split(".") if part.isdecimal()]
            where = f"layer {numbers[0]} ({name})" if numbers else name
            raise ValueError(
                f"{where} of the model holds NaN or infinity, in {parameter.dtype}: load it in float32, or from another "
                "source if it is damaged there too"
            )


def _is_finite(weight: Tensor) -> bool:
    """Whether no entry is NaN or infinity; without a copy of the weight's size, which `isfinite` makes several of."""
    return not weight.numel() or all(bool(extreme.isfinite()) for extreme in weight.aminmax())  # NaN is both extremes


def make_undecided(router: Router) -> None:
    """Set a learned router's weights so that its softmaxes are uniform up to `UNDECIDED`."""
    for parameter in router.parameters():  # [heads, C]; the layer's input has about unit mean square
        nn.init.normal_(parameter, std=UNDECIDED / parameter.shape[-1] ** 0.5)


def _batches(calibration: Any) -> Iterator[Any]:
    """The images of each batch, as a DataLoader gives them: alone, before the labels, or as "pixel_values"."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, str | Mapping):
        raise ValueError(
            f"calibration must be images [n, C, H, W] or batches of them, got {type(calibration).__name__}"
        )
    for batch in calibration:
        if isinstance(batch, Mapping):
            batch = batch.get("pixel_values", batch.get("image"))
        elif isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        yield batch


def _checked(images: Any) -> Tensor:
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or len(images) == 0:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"calibration must be floating-point images [n, C, H, W], normalised for the model, got {got}")
    if not bool(images.isfinite().all()):
        raise ValueError("calibration must be finite, got NaN or infinity among the images")
    return images
