"""Training language models: texts, recipes, and runs on the transformers Trainer (extra `llm`).

Not for evaluation (`moh.evaluation`). Importing this imports no extra; `train` and `MoHTrainer` are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moh.training.corpus import CORPORA, DEFAULT_CORPUS, Corpus, corpus_from_files, load_corpus
from moh.training.data import TokenBlocks, pack_tokens
from moh.training.distillation import distillation_loss
from moh.training.precision import choose_precision
from moh.training.recipe import Recipe, load_recipe
from moh.training.text import read_texts

if TYPE_CHECKING:
    from moh.training.run import TrainResult, train
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


def __getattr__(name: str) -> Any:
    if name in ("train", "TrainResult"):
        from moh.training import run

        return getattr(run, name)
    if name == "MoHTrainer":
        from moh.training.trainer import MoHTrainer

        return MoHTrainer
    raise AttributeError(f"module 'moh.training' has no attribute {name!r}")
