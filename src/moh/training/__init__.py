"""Training: recipes, data, and runs on the transformers Trainer (extra `llm`), for every family of models.

Importing this needs no extra: modules that need one are imported on first use.
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
"""A recipe's task -> the module whose `train` runs it."""


def train(recipe: Any, **overrides: Any) -> Any:
    """Run a recipe of any family; resumes if its `output_dir` holds a complete checkpoint of the same recipe.

    Args:
        recipe: as `load_recipe` reads it.
        overrides: objects to use instead of the recipe's: see the `train` of its family (`moh.training.run`).

    Returns:
        the result of the family's `train`; all have `model_dir`, `losses` and `precision`.

    Raises:
        ValueError: a field of the recipe is wrong or unsupported; names it, and is raised before training.
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
