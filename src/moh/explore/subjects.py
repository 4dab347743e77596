"""Models to explore: loading them, their reference, and one dial for a whole model, over `moh.models.dial`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh.models.dial import active_heads, allowed_counts, head_share, moh_routers
from moh.models.heads import use_of_heads
from moh.models.hub import kind_at
from moh.models.transformers.families import is_text_encoder, supported_positions
from moh.routing import Router

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Dial:
    """Routed heads active per token, as one number for all layers of a model.

    In a layer with fewer choices than others (fewer heads, or routing by groups) the number stands for the proportional
    choice. If the conversion has saved what each layer's heads are worth (`config.head_costs`), the number is the mean
    over the layers, distributed by those costs. Not locked: `Subject.at` admits one user at a time.

    Args:
        model: MoH or dense.

    Attributes:
        values: possible values of the dial, ascending; empty for a dense model and one whose layers leave no choice.
        own: the value of the model's own setting; None if there is none, as when layers were set one by one.
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
        """Routed heads active per token in each MoH layer, as currently set."""
        return [router.config.active_heads for router in self.routers]

    @property
    def uses_all(self) -> bool:
        """Whether at the dial's last value every token uses every head, each with the weight 1."""
        hard = all(router.is_hard for router in self.routers)
        most = [choices[-1] for choices in self._choices]
        return hard and bool(self.values) and most == [router.config.num_routed for router in self.routers]

    @contextmanager
    def at(self, value: int | None) -> Iterator[float]:
        """Inside the block the model has this setting.

        Args:
            value: one of `values`; None keeps the model's own.

        Yields:
            share of the heads that a token uses, over all MoH layers; 1 for a dense model.

        Raises:
            ValueError: `value` is not one of `values`.
        """
        if value is None:
            yield head_share([router.config for router in self.routers]) if self.routers else 1.0
            return
        with active_heads(self.model, self._setting(value)) as share:
            yield share

    def _setting(self, value: int) -> list[int] | float:
        if value not in self.values:
            allowed = f"one of {', '.join(map(str, self.values))}" if self.values else "None for this model"
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


@dataclass(frozen=True)
class Reference:
    """What the model is compared with.

    Attributes:
        label: short name.
        note: what a reader of the comparison must know.
        model: the dense model, or the explored one.
        value: of the explored model's dial; None for a separate model.
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
        reference: what it is compared with; None for nothing.
    """

    name: str
    model: nn.Module
    dial: Dial
    reference: Reference | None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @contextmanager
    def at(self, value: int | None) -> Iterator[float]:
        """The model at a dial value, for one user at a time; `reference_at` may be entered inside.

        Yields:
            the share of heads that a token uses.

        Raises:
            ValueError: the dial has no such value.
        """
        with self._lock, self.dial.at(value) as share:
            yield share

    @contextmanager
    def reference_at(self) -> Iterator[nn.Module]:
        """Inside `at`: the model to compare with, at its own dial value."""
        assert self.reference is not None
        with self.dial.at(self.reference.value):
            yield self.reference.model

    @property
    def facts(self) -> str:
        """A description of the model in a sentence or two."""
        routers = self.dial.routers
        if not routers:
            return "A dense model: every token uses every head of every layer, so there is nothing to dial."
        heads = sorted({router.config.num_heads for router in routers})
        shared = sorted({router.config.num_shared for router in routers})
        kinds = ", ".join(sorted({router.config.router for router in routers}))
        said = f"{len(routers)} MoH layers of {_range(heads)} heads, {_range(shared)} of them shared (router: {kinds})."
        with self.dial.at(None) as share:
            said += f" As saved, {use_of_heads([router.config for router in routers], share)}."
        if not self.dial.values:
            said += " Its layers leave no choice of share."
        return said


@dataclass(frozen=True)
class TextSubject(Subject):
    """A causal language model or an encoder with its tokenizer; reads up to `max_tokens` tokens of a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    @property
    def predicts(self) -> bool:
        """Whether the model predicts the next token; an encoder does not."""
        return not is_text_encoder(self.model.config)


@dataclass(frozen=True)
class Eyes:
    """An image model's input and output: `transform` turns an image into `[C, H, W]`, `logits` this into `[K]`."""

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


MOST_TOKENS = 1_024
"""Longer texts are cut, so that an answer on a CPU does not take minutes."""


def load_subject(
    checkpoint: str | Path,
    *,
    dense: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
) -> TextSubject | ImageSubject:
    """Load a model for `moh explore`.

    Args:
        checkpoint: a language model or encoder of text, MoH or dense, as for `load_text_model`; or an image
            classifier: a directory in timm's or transformers' format, or "hf-hub:NAME" for one of timm's.
        dense: the dense model to compare with, of the same kind.
        dtype: of the weights of language models; "auto" keeps each checkpoint's, but takes float32 where the processor
            would emulate bfloat16.
        device: where the models go; None takes the accelerator if there is one.
        device_map: as in `from_pretrained`, for language models, instead of `device`.
        revision: branch, tag or commit of the checkpoint, if it is a hub name.

    Raises:
        ValueError: there is no such model, the dense one has other classes or another vocabulary, or `dtype` or `device_map`
            is given for a classifier.
    """
    kinds = {checkpoint: kind_at(checkpoint, revision=revision).task}
    if dense is not None:
        kinds[dense] = kind_at(dense).task
    for path, task in kinds.items():
        if task == "diffusion":
            raise ValueError(f"moh explore shows language models and image classifiers, and {path} is neither")
    reads_images = kinds[checkpoint] == "images"
    if dense is not None and kinds[dense] != kinds[checkpoint]:
        wanted, other = ("an image classifier", "none") if reads_images else ("a language model", "an image classifier")
        raise ValueError(f"--dense must be {wanted} like {checkpoint}, but {dense} is {other}")
    require("transformers", extra="app")
    from moh.models.transformers.loading import default_device

    name = Path(checkpoint).name or str(checkpoint)
    if not reads_images:
        place: dict[str, Any] = (
            {"device": device or default_device()} if device_map is None else {"device_map": device_map}
        )
        return _text_subject(name, checkpoint, dense, revision, dtype, place)
    if device_map is not None or dtype not in ("auto", torch.float32):
        raise ValueError(
            f"--device-map must be left out and --dtype be float32 for the image classifier {checkpoint}, got "
            f"{device_map!r} and {str(dtype).removeprefix('torch.')}"
        )
    return _image_subject(name, checkpoint, dense, revision, device or default_device())


def _text_subject(
    name: str,
    checkpoint: str | Path,
    dense: str | Path | None,
    revision: str | None,
    dtype: torch.dtype | str,
    place: dict[str, Any],
) -> TextSubject:
    from moh.models.transformers.loading import default_device, load_text_model, load_tokenizer
    from moh.training.session import choose_precision

    tokenizer = load_tokenizer(checkpoint, revision=revision)
    if dense is not None and load_tokenizer(dense).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--dense must have the vocabulary of {checkpoint}, but {dense} has another")
    if dtype == "auto" and choose_precision(place.get("device") or default_device()) == "fp32":
        dtype = torch.float32  # some CPUs emulate bfloat16, many times slower than float32
    model = load_text_model(checkpoint, dtype=dtype, revision=revision, **place).eval()
    other = None if dense is None else load_text_model(dense, dtype=dtype, **place).eval()
    dial = Dial(model)
    if other is not None and is_text_encoder(other.config) != is_text_encoder(model.config):
        raise ValueError(
            f"--dense must predict the next token if {checkpoint} does, and must not otherwise: {dense} differs"
        )
    configs = [each.config for each in (model, other) if each is not None]
    limits = [supported_positions(config) or MOST_TOKENS for config in configs]
    reference = _reference(model, dial, other, dense)
    return TextSubject(name, model, dial, reference, tokenizer, min(MOST_TOKENS, *limits))


def _image_subject(
    name: str, checkpoint: str | Path, dense: str | Path | None, revision: str | None, device: torch.device
) -> ImageSubject:
    model, classes, eyes = _load_classifier(checkpoint, device, revision)
    dial = Dial(model)
    if dense is None:
        return ImageSubject(name, model, dial, _reference(model, dial, None, None), classes, eyes, eyes)
    other, other_classes, other_eyes = _load_classifier(dense, device)
    if other_classes != classes:
        raise ValueError(f"--dense must have the {len(classes)} classes of {checkpoint}, but {dense} has others")
    return ImageSubject(name, model, dial, _reference(model, dial, other, dense), classes, eyes, other_eyes)


def _reference(model: nn.Module, dial: Dial, dense: nn.Module | None, path: str | Path | None) -> Reference | None:
    if dense is not None:
        kind = "dense" if not Dial(dense).routers else "a MoH model, given as --dense"
        return Reference(f"{Path(str(path)).name} ({kind})", "", dense)
    if not dial.uses_all:
        return None
    note = (
        "Compared with the same model with all heads active. That is the dense original if the model was converted "
        "without a refit of its output weights and not tuned since; otherwise give the original with --dense."
    )
    return Reference("all heads active", note, model, dial.values[-1])


def _load_classifier(
    path: str | Path, device: torch.device, revision: str | None = None
) -> tuple[nn.Module, tuple[str, ...], Eyes]:
    from moh.data.images.augmentation import eval_transform
    from moh.models.classifiers import class_names, image_input, load_classifier, logits_of, num_classes

    model = load_classifier(path, device=device, revision=revision)
    names = class_names(model) or tuple(f"class {index}" for index in range(num_classes(model)))

    def logits(pixels: Tensor) -> Tensor:
        return logits_of(model, pixels[None].to(device))[0].float()

    return model, names, Eyes(eval_transform(image_input(model)), logits)
