"""Training: recipes, data, and runs on the transformers Trainer (extra `train`), for every family of models.

Importing this needs no extra: modules that need one are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh._lazy import lazy
from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS, Corpus, corpus_from_files, load_corpus
from moh.data.text.files import read_texts
from moh.training.language.recipe import Recipe
from moh.training.recipes import load_recipe

if TYPE_CHECKING:
    from moh.data.text.blocks import TokenBlocks, pack_tokens
    from moh.training.language.run import TrainResult
    from moh.training.language.trainer import MoHTrainer, distillation_loss
    from moh.training.session import choose_precision

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
    "language": "moh.training.language.run",
    "image_classification": "moh.training.images.run",
    "diffusion": "moh.training.diffusion.run",
}
"""A recipe's task -> the module whose `train` runs it."""


def train(recipe: Any, **overrides: Any) -> Any:
    """Run a recipe of any family; resumes if its `output_dir` holds a complete checkpoint of the same recipe.

    Args:
        recipe: as `load_recipe` reads it.
        overrides: objects to use instead of the recipe's: see the `train` of its family (`moh.training.language.run`).

    Returns:
        the result of the family's `train`; all have `model_dir`, `losses` and `precision`.

    Raises:
        ValueError: a field of the recipe is wrong or unsupported; names it, and is raised before training.
    """
    for package in ("transformers", "accelerate", "tensorboard"):
        require(package, extra="train")
    return importlib.import_module(_RUNS[recipe.task]).train(recipe, **overrides)


__getattr__, __dir__ = lazy(
    __name__,
    {
        "MoHTrainer": "moh.training.language.trainer",
        "TokenBlocks": "moh.data.text.blocks",
        "TrainResult": "moh.training.language.run",
        "choose_precision": "moh.training.session",
        "distillation_loss": "moh.training.language.trainer",
        "pack_tokens": "moh.data.text.blocks",
    },
    extras={
        "moh.training.language.run": ("transformers", "train"),
        "moh.training.language.trainer": ("transformers", "train"),
        "moh.training.session": ("accelerate", "train"),
    },
)
