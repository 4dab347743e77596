"""Training: recipes, data, and runs on the transformers Trainer (extra `llm`), for every family of models.

Not for evaluation (`moh.evaluation`). Importing this imports no extra; what needs one is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh._lazy import lazy
from moh.training.corpus import CORPORA, DEFAULT_CORPUS, Corpus, corpus_from_files, load_corpus
from moh.training.recipe import Recipe
from moh.training.recipe_file import load_recipe
from moh.training.text import read_texts

if TYPE_CHECKING:
    from moh.training.data import TokenBlocks, pack_tokens
    from moh.training.distillation import distillation_loss
    from moh.training.precision import choose_precision
    from moh.training.run import TrainResult
    from moh.training.trainer import MoHTrainer

__all__ = [
    "CORPORA",
    "DEFAULT_CORPUS",
    "Corpus",
    "MoHTrainer",
    "Recipe",
    "TokenBlocks",
    "TrainResult",
    "choose_precision",
    "corpus_from_files",
    "distillation_loss",
    "load_corpus",
    "load_recipe",
    "pack_tokens",
    "read_texts",
    "train",
]


_RUNS = {
    "language": "moh.training.run",
    "image_classification": "moh.training.images.run",
    "diffusion": "moh.training.diffusion.run",
}
"""task of a recipe -> the module whose `train` runs it."""


def train(recipe: Any, **overrides: Any) -> Any:
    """Run a recipe of any family; if its `output_dir` holds a complete checkpoint of the same recipe, go on from there.

    Args:
        recipe: as `load_recipe` reads it.
        overrides: objects in place of what the recipe names: see the `train` of its family (`moh.training.run`).

    Returns:
        what the family's `train` returns; `model_dir`, `losses` and `precision` are common to all.

    Raises:
        ValueError: something in the recipe can't be served (the message names the field); raised before training.
    """
    for package in ("transformers", "accelerate", "tensorboard"):
        require(package, extra="llm")
    return importlib.import_module(_RUNS[recipe.task]).train(recipe, **overrides)


__getattr__, __dir__ = lazy(
    __name__,
    {
        "MoHTrainer": "moh.training.trainer",
        "TokenBlocks": "moh.training.data",
        "TrainResult": "moh.training.run",
        "choose_precision": "moh.training.precision",
        "distillation_loss": "moh.training.distillation",
        "pack_tokens": "moh.training.data",
    },
    extras={
        "moh.training.run": ("transformers", "llm"),
        "moh.training.trainer": ("transformers", "llm"),
    },
)
