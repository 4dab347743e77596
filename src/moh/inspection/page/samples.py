"""The inputs that a page shows: a text or an image, with what every head did with its tokens.

Running the model happens here; how it is written into HTML is in `page`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moh.inspection.trace import LayerTrace, trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PageSample:
    """One input and its layers.

    Attributes:
        name: shown in the list of inputs.
        group: inputs of one group are averaged in the map (a class, a task, a file).
        layers: of a batch of one.
        tokens: text of each token, or None for an image.
        image: the image as the model saw it, or None for a text.
    """

    name: str
    group: str
    layers: list[LayerTrace]
    tokens: list[str] | None = None
    image: Image | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.image is None):
            raise ValueError("a PageSample needs either tokens or an image")
        if self.tokens is not None:
            for layer in self.layers:
                if layer.gates.shape[:2] != (1, len(self.tokens)):
                    raise ValueError(
                        f"layers must hold one input of {len(self.tokens)} tokens, "
                        f"got {tuple(layer.gates.shape[:2])} in {layer.name}"
                    )

    def grid(self, layer: LayerTrace) -> tuple[int, int, int]:
        """(class and register tokens before the patches, rows, columns) of an image's layer."""
        assert self.image is not None
        return patch_grid(layer.gates.shape[1], self.image.width / self.image.height)


def patch_grid(tokens: int, aspect: float) -> tuple[int, int, int]:
    """How `tokens` are laid out over an image of an aspect ratio: (tokens before the patches, rows, columns).

    Raises:
        ValueError: no grid of that aspect, with up to 16 tokens before it, has so many tokens.
    """
    for prefix in range(min(17, tokens)):
        patches = tokens - prefix
        rows = max(1, round((patches / aspect) ** 0.5))
        if patches % rows == 0 and abs(patches / rows / rows / aspect - 1) < 0.15:
            return prefix, rows, patches // rows
    raise ValueError(f"{tokens} tokens are not laid out over an image {aspect:.2f} times as wide as high")


def text_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str = "text",
    group: str | None = None,
    max_tokens: int = 2_000,
) -> PageSample:
    """Run a language model or text encoder over the beginning of a text.

    Args:
        model: MoH or dense.
        tokenizer: the model's.
        text: anything; what is cut off after `max_tokens` is not shown.
        name: in the list of inputs.
        group: default is `name`.
        max_tokens: at most so many tokens.

    Raises:
        ValueError: the text has no tokens.
    """
    ids, pieces = tokenise(tokenizer, text, max_tokens)
    if not ids:
        raise ValueError(f"text must hold at least one token, got {text[:40]!r}")
    tokens = torch.tensor([ids], device=model.device)
    decoder = model.get_decoder() or model
    extra = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    layers = trace(model, lambda: decoder(input_ids=tokens, **extra))
    return PageSample(name, name if group is None else group, layers, tokens=pieces)


def image_sample(
    model: nn.Module, image: Image, transform: Callable[[Image], Tensor], *, name: str = "image", group: str = "images"
) -> PageSample:
    """Run an image model over one image.

    Args:
        model: takes `[1, C, height, width]`.
        image: any size and mode that `transform` takes.
        transform: as in evaluation: image -> `[C, height, width]`; what it does to sizes is done to the picture shown.
        name: in the list of inputs.
        group: for example the image's class.
    """
    pixels = transform(image)
    batch = pixels[None].to(next(model.parameters()).device)
    return PageSample(name, group, trace(model, lambda: model(batch)), image=picture(pixels))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> tuple[list[int], list[str]]:
    """Token ids, and the part of the text that each stands for."""
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, verbose=False)["input_ids"])[:max_tokens]
        return ids, [tokenizer.decode([i]) for i in ids]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    pieces, end = [], 0
    for token, (start, stop) in zip(ids, spans, strict=True):
        if start == stop:  # special tokens stand for no text
            pieces.append(tokenizer.decode([token]))
        else:  # several tokens may share a character: the first shows it, and characters before it that no token has
            pieces.append(text[min(start, end) : stop] if stop > end else "·")
            end = max(end, stop)
    return list(ids), pieces


def picture(pixels: Tensor) -> Image:
    """The tensor as a picture, its values spread over the whole range because normalisation is not known."""
    from PIL import Image

    low, high = pixels.amin(), pixels.amax()
    levels = ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8).cpu()
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
