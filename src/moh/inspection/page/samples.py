"""The inputs that a page shows: a text or an image, with what every head did with its tokens.

The model runs here; `page` writes the HTML.
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
        layers: traces of a batch of one.
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
    """Layout of `tokens` over an image of aspect ratio width / height: (tokens before the patches, rows, columns).

    Raises:
        ValueError: no grid of that aspect, with up to 16 tokens before it, has this many tokens.
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
        text: any text; it is cut off after `max_tokens`.
        name: in the list of inputs.
        group: None means `name`.
        max_tokens: most tokens to read.

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
        transform: as in evaluation: image -> `[C, height, width]`; the picture shown is its result.
        name: in the list of inputs.
        group: for example the image's class.
    """
    pixels = transform(image)
    batch = pixels[None].to(next(model.parameters()).device)
    return PageSample(name, group, trace(model, lambda: model(batch)), image=picture(pixels))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> tuple[list[int], list[str]]:
    """Token ids, and each token's part of the text."""
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, verbose=False)["input_ids"])[:max_tokens]
        return ids, [tokenizer.decode([i]) for i in ids]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    pieces, end = [], 0
    for token, (start, stop) in zip(ids, spans, strict=True):
        if start == stop:  # special tokens have no part of the text
            pieces.append(tokenizer.decode([token]))
        else:  # the first of several tokens that share a character shows it, and characters that no token covers
            pieces.append(text[min(start, end) : stop] if stop > end else "·")
            end = max(end, stop)
    return list(ids), pieces


def picture(pixels: Tensor) -> Image:
    """The tensor as a picture, its values stretched to the whole range because the normalisation is unknown."""
    from PIL import Image

    low, high = pixels.amin(), pixels.amax()
    levels = ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8).cpu()
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
