"""Checkpoints -> what `moh explore` shows, each read as what it is: MoH or dense, language model or image classifier.

Not for running them: see `texts` and `images`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh._extras import require
from moh.explore.dial import Dial
from moh.explore.subjects import Eyes, ImageSubject, Reference, TextSubject
from moh.models.kinds import kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 1_024
"""A longer text is cut, so that an answer on a CPU does not take minutes."""


def load_subject(checkpoint: str | Path, *, dense: str | Path | None = None) -> TextSubject | ImageSubject:
    """Load what `moh explore` shows.

    Args:
        checkpoint: a language model as `moh.models.transformers.loading.load_causal_lm` takes it, MoH or dense; or an image
            classifier: a directory in timm's or transformers' format, or "hf-hub:NAME" for one of timm's.
        dense: the dense model to compare with, of the same kind.

    Raises:
        ValueError: there is no such model, or the dense one has other classes or another vocabulary.
    """
    kinds = {path: kind_of(path).task for path in (checkpoint, dense) if path is not None}
    for path, task in kinds.items():
        if task == "diffusion":
            raise ValueError(f"moh explore shows language models and image classifiers, and {path} is neither")
    reads_images = kinds[checkpoint] == "images"
    if dense is not None and kinds[dense] != kinds[checkpoint]:
        wanted, other = ("an image classifier", "none") if reads_images else ("a language model", "an image classifier")
        raise ValueError(f"--dense must be {wanted} like {checkpoint}, but {dense} is {other}")
    load = _image_subject if reads_images else _text_subject
    return load(Path(checkpoint).name or str(checkpoint), checkpoint, dense)


def _text_subject(name: str, checkpoint: str | Path, dense: str | Path | None) -> TextSubject:
    require("transformers", extra="llm")
    from moh.models.transformers.loading import default_device, load_causal_lm, load_tokenizer
    from moh.training.precision import choose_precision

    tokenizer = load_tokenizer(checkpoint)
    if dense is not None and load_tokenizer(dense).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--dense must have the vocabulary of {checkpoint}, but {dense} has another")
    device = default_device()
    # some CPUs emulate bfloat16, many times slower than float32
    dtype = torch.float32 if choose_precision(device) == "fp32" else "auto"
    model = load_causal_lm(checkpoint, dtype=dtype, device=device).eval()
    other = None if dense is None else load_causal_lm(dense, dtype=dtype, device=device).eval()
    dial = Dial(model)
    longest = getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS
    if other is not None:
        longest = min(longest, getattr(other.config, "max_position_embeddings", None) or longest)
    reference = _reference(model, dial, other, dense)
    return TextSubject(name, model, dial, reference, tokenizer, min(MOST_TOKENS, longest))


def _image_subject(name: str, checkpoint: str | Path, dense: str | Path | None) -> ImageSubject:
    model, classes, eyes = _load_classifier(checkpoint)
    dial = Dial(model)
    if dense is None:
        return ImageSubject(name, model, dial, _reference(model, dial, None, None), classes, eyes, eyes)
    other, other_classes, other_eyes = _load_classifier(dense)
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
        "without a refit of its output weights and not tuned since; otherwise give the original by --dense."
    )
    return Reference("all heads active", note, model, dial.values[-1])


def _load_classifier(path: str | Path) -> tuple[nn.Module, tuple[str, ...], Eyes]:
    from moh.models.transformers.loading import default_device

    device = default_device()
    if kind_of(path).library == "timm":
        from moh.models.image_loading import class_names, image_input, load_image_classifier
        from moh.training.images.augmentation import eval_transform

        timm_model: Any = load_image_classifier(path, device=device)
        names = class_names(timm_model) or tuple(f"class {index}" for index in range(timm_model.num_classes))
        return timm_model, names, Eyes(eval_transform(image_input(timm_model)), _on(device, timm_model))
    require("transformers", extra="llm")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(path, use_safetensors=True).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(path)

    def transform(image: Image) -> Tensor:
        pixels: Tensor = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    labels = model.config.id2label
    return model, tuple(labels[i] for i in range(len(labels))), Eyes(transform, _on(device, model))


def _on(device: torch.device, model: Any) -> Callable[[Tensor], Tensor]:
    def logits(pixels: Tensor) -> Tensor:
        outputs = model(pixels[None].to(device))
        found: Tensor = getattr(outputs, "logits", outputs)
        return found[0].float()

    return logits
