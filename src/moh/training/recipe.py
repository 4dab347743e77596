"""A training run of a language model as data: frozen dataclasses, every field validated once, at construction.

Not for reading files (`moh.training.recipe_file`) nor for running anything (`moh.training.train`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moh.training.corpus import CORPORA, DEFAULT_CORPUS
from moh.training.settings import TrainingSettings, at_least


@dataclass(frozen=True)
class ModelRecipe:
    """The pretrained model to start from.

    Args:
        path: a local directory, a name on the model hub, or a .gguf file (which holds weights and tokenizer).
    """

    path: str


@dataclass(frozen=True)
class ConversionRecipe:
    """How the dense model becomes a MoH model before training: the arguments of `moh.convert`.

    Args:
        shared_heads: heads per layer that every token uses.
        active_heads: routed heads per layer that each token chooses.
        router: "linear" (fitted to the heads' contributions), "query_norm" (the paper's, without parameters) or
            "two_stage" (the paper's learned one).
        calibration_tokens: tokens of the training text that the conversion looks at; "query_norm" needs none.
        allocation: "even" gives every layer the same number of heads, "sensitivity" more to the layers that need them.
        refit_output: refit the output projections so that the active heads make up for the others.
    """

    shared_heads: int
    active_heads: int
    router: str = "linear"
    calibration_tokens: int = 12_288
    allocation: Literal["even", "sensitivity"] = "even"
    refit_output: bool = False


@dataclass(frozen=True)
class DataRecipe:
    """The text to train on, and its held-out part.

    Args:
        corpus: a built-in corpus (`moh.training.corpus.CORPORA`); not used if `files` are given.
        files: your own text files or directories (.txt, .md, .html, UTF-8).
        heldout_files: text files to hold out; without them a fixed tenth of `files` is held out.
        seq_len: tokens per training sequence.
        cache_dir: where fetched corpora are kept (default ~/.cache/moh).
    """

    corpus: str = DEFAULT_CORPUS
    files: list[str] = field(default_factory=list)
    heldout_files: list[str] = field(default_factory=list)
    seq_len: int = 512
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ValueError(f"data.corpus must be one of {', '.join(CORPORA)}, got {self.corpus!r}")
        if self.heldout_files and not self.files:
            raise ValueError("data.heldout_files needs data.files: a built-in corpus has its own held-out part")
        at_least("data.seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class TrainingRecipe(TrainingSettings):
    """How to train a language model: `TrainingSettings`, and distillation from the dense original.

    Args:
        distillation_weight: w in (1 - w) next-token loss + w T^2 KL(dense original || model).
        distillation_temperature: T of the distillation.
    """

    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"training.distillation_weight must be between 0 and 1, got {self.distillation_weight}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"training.distillation_temperature must be above 0, got {self.distillation_temperature}")


@dataclass(frozen=True)
class Recipe:
    """One training run of a language model.

    Args:
        model: the pretrained model to start from.
        training: how to train.
        data: the text.
        conversion: how to make a MoH model of it first; null trains the model as it is (the dense control).
        task: tells recipes of language models from others.
    """

    model: ModelRecipe
    training: TrainingRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    conversion: ConversionRecipe | None = None
    task: Literal["language"] = "language"

    def __post_init__(self) -> None:
        if self.conversion is not None:  # here, because the parser hides what an optional part raises
            at_least("conversion.calibration_tokens", self.conversion.calibration_tokens, 1)
