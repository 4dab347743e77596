"""The model that a recipe names, loaded in float32 and converted.

Not for the conversion itself (`moh.conversion`) nor for published MoH checkpoints (`moh.checkpoints`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moh._extras import require
from moh.training.checkpoints import replacing_directory
from moh.training.recipe import ModelRecipe, Recipe

require("transformers", extra="llm")

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments  # noqa: E402

from moh.models.loading import load_causal_lm  # noqa: E402
from moh.models.loading import load_tokenizer as _load_tokenizer  # noqa: E402


def load_dense(model: ModelRecipe) -> PreTrainedModel:
    """Load the recipe's model in float32 (autocast, not the weights, makes training cheaper).

    Raises:
        ValueError: transformers can't load it.
    """
    try:
        return load_causal_lm(model.path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unloadable(model, error) from None


def load_tokenizer(model: ModelRecipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe's model.

    Raises:
        ValueError: transformers can't load it.
    """
    try:
        return _load_tokenizer(model.path)
    except (OSError, ValueError) as error:
        raise _unloadable(model, error) from None


def build_model(recipe: Recipe, train_blocks: Tensor, arguments: TrainingArguments) -> PreTrainedModel:
    """Load the recipe's model and convert it if the recipe says so.

    Under torchrun one process converts and the others load its result, so that all have the same heads.
    """
    if recipe.conversion is None:
        return load_dense(recipe.model)
    if arguments.world_size == 1:
        return _convert(recipe, train_blocks)
    target = Path(arguments.output_dir) / "converted"
    with arguments.main_process_first(local=False, desc="converting the model"):
        if arguments.process_index == 0:
            with replacing_directory(target) as scratch:
                _convert(recipe, train_blocks).save_pretrained(scratch)
    return load_causal_lm(target, dtype=torch.float32)


def _convert(recipe: Recipe, train_blocks: Tensor) -> PreTrainedModel:
    from moh.conversion import convert

    assert recipe.conversion is not None
    settings = recipe.conversion
    return convert(
        load_dense(recipe.model),
        shared_heads=settings.shared_heads,
        active_heads=settings.active_heads,
        router=settings.router,
        calibration=None if settings.router == "query_norm" else train_blocks,
        calibration_tokens=settings.calibration_tokens,
        allocation=settings.allocation,
        refit_output=settings.refit_output,
    )


def _unloadable(model: ModelRecipe, error: Exception) -> ValueError:
    return ValueError(f"model.path {model.path!r} can't be loaded: {' '.join(str(error).split())}")
