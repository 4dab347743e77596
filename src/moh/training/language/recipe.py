"""A training run of a language model as data: frozen dataclasses, every field validated once, at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moh._checks import at_least
from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS
from moh.data.text.readers import SourceRecipe, check_sources
from moh.training.recipes import ConversionSettings, TrainingSettings


@dataclass(frozen=True)
class HeadsRecipe:
    """The heads of each layer.

    Args:
        shared_heads: heads that every token uses: one number, or one per layer.
        active_heads: routed heads that each token chooses, likewise.
        router: "two_stage" (the paper's), "single_stage" (its ablation) or "query_norm".
        routing_unit: "head", "group_balanced" or "kv_group": what a token chooses (`moh.MoHConfig`).
    """

    shared_heads: int | list[int]
    active_heads: int | list[int]
    router: str = "two_stage"
    routing_unit: str = "head"


@dataclass(frozen=True)
class FromScratchRecipe:
    """A model of the Llama family with random weights; the names are those of `transformers.LlamaConfig`.

    Args:
        num_hidden_layers: L.
        hidden_size: C.
        intermediate_size: width of the feed-forward layers.
        num_attention_heads: h, each of width C / h, or of `extra`'s head_dim.
        num_key_value_heads: heads of keys and values; null means h.
        max_position_embeddings: the longest sequence that the model supports.
        vocab_size: rows of the embedding; null means the tokenizer's. Without a tokenizer, the size of the new one.
        tokenizer: directory or hub name; null makes a byte-level BPE tokenizer from the training text.
        tie_word_embeddings: use the embedding as the output layer too.
        moh: the heads of each layer; null makes a dense model.
        extra: further arguments of `transformers.LlamaConfig`, by name.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    vocab_size: int | None = None
    tokenizer: str | None = None
    tie_word_embeddings: bool = False
    moh: HeadsRecipe | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = "model.from_scratch"
        for number in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
            at_least(f"{name}.{number}", getattr(self, number), 1)
        at_least(f"{name}.max_position_embeddings", self.max_position_embeddings, 2)
        if self.hidden_size % self.num_attention_heads and "head_dim" not in self.extra:
            raise ValueError(
                f"{name}.hidden_size must be a multiple of num_attention_heads = {self.num_attention_heads}, or extra must "
                f"set head_dim, got {self.hidden_size}"
            )
        if self.tokenizer is None and self.vocab_size is None:
            raise ValueError(f"{name} needs a tokenizer, or the vocab_size of the one to make from the training text")
        if self.vocab_size is not None:
            at_least(f"{name}.vocab_size", self.vocab_size, 1)


@dataclass(frozen=True)
class ModelRecipe:
    """The model to start from: a pretrained one, or one with random weights.

    Args:
        path: a local directory, a name on the model hub, or a .gguf file (which holds weights and tokenizer).
        from_scratch: sizes, heads and tokenizer of a new model, instead of `path`.
    """

    path: str | None = None
    from_scratch: FromScratchRecipe | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError(
                "model must have either a path or from_scratch, got " + ("both" if self.path else "neither")
            )


@dataclass(frozen=True)
class ConversionRecipe(ConversionSettings):
    """How the dense model becomes a MoH model before training: `ConversionSettings` plus the following.

    Args:
        routing_unit: "head", "group_balanced" or "kv_group": what a token chooses (`moh.MoHConfig`).
        calibration: texts that the conversion reads, in equal parts if several, each `NAME[:config][:split]` of a Hugging
            Face data set, a path or a built-in corpus (`moh.data.text.named`); default the training text.
        calibration_tokens: tokens of them; "query_norm" needs none.
        calibration_length: lengths of the blocks that they are cut into, with as many tokens of each, up to the model's
            max_position_embeddings; default as in `moh convert --calibration-length`, whatever `data.seq_len` is: [512, 4096]
            where there is enough text, else 512, or all positions of a model that has fewer.
        inactive_gate_gradient: in training, "zero" leaves inactive heads out; "dense" computes them too, and gives their gates
            the gradient that they would have if active (the paper's equations 9 and 10), which costs what dense attention does.
    """

    routing_unit: str = "head"
    calibration: list[str] = field(default_factory=list)
    calibration_tokens: int = 49_152
    calibration_length: list[int] = field(default_factory=list)
    inactive_gate_gradient: Literal["zero", "dense"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("conversion.calibration_tokens", self.calibration_tokens, 1)
        for length in self.calibration_length:
            at_least("conversion.calibration_length", length, 2)


@dataclass(frozen=True)
class DataRecipe:
    """The text to train on, and its held-out part.

    Args:
        corpus: a built-in corpus (`moh.data.text.corpora.CORPORA`); not used if `files` are given.
        files: your own text files or directories (.txt, .md, .html, UTF-8).
        heldout_files: text files to hold out; without them a fixed tenth of `files` is held out.
        sources: text from any mix of files, data sets and corpora, instead of `corpus` and `files`: tokenised once, kept in
            `cache_dir`, and packed so that no document sees another.
        heldout_sources: likewise, to evaluate on if `training.extra` sets an `eval_strategy`.
        streaming: tokenise `sources` while reading and store nothing.
        stream_buffer: sequences of each source that streaming reads ahead and shuffles.
        seq_len: tokens per training sequence.
        cache_dir: where fetched corpora and tokens are kept (default ~/.cache/moh).
    """

    corpus: str = DEFAULT_CORPUS
    files: list[str] = field(default_factory=list)
    heldout_files: list[str] = field(default_factory=list)
    sources: list[SourceRecipe] = field(default_factory=list)
    heldout_sources: list[SourceRecipe] = field(default_factory=list)
    streaming: bool = False
    stream_buffer: int = 1024
    seq_len: int = 512
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ValueError(f"data.corpus must be one of {', '.join(CORPORA)}, got {self.corpus!r}")
        if self.heldout_files and not self.files:
            raise ValueError("data.heldout_files needs data.files: a built-in corpus has its own held-out part")
        if self.files and self.sources:
            raise ValueError("data must have either files or sources, got both; a file may be a source")
        if not self.sources and (self.heldout_sources or self.streaming):
            raise ValueError("data.heldout_sources and data.streaming need data.sources")
        check_sources(self.sources, name="data.sources")
        check_sources(self.heldout_sources, name="data.heldout_sources")
        at_least("data.stream_buffer", self.stream_buffer, 1)
        at_least("data.seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class TrainingRecipe(TrainingSettings):
    """How to train a language model: `TrainingSettings` plus distillation from the dense original.

    Args:
        lr_scheduler_kwargs: options of the schedule: `{min_lr_rate: 0.1}` for "cosine_with_min_lr" ends at 10 % of the peak.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        tokens_per_batch: tokens per optimiser step; `gradient_accumulation_steps` is then computed from it, the length of the
            sequences, the batch size and the number of processes.
        only: modules or parameters that are trained, such as [o_proj, router]; the others keep their values, and no gradients
            of theirs are computed. Each is a part between the dots of parameters' names. Empty trains all.
        distillation_weight: w in (1 - w) next-token loss + w T^2 KL(dense original || model).
        distillation_temperature: T of the distillation.
    """

    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    tokens_per_batch: int | None = None
    only: list[str] = field(default_factory=list)
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        at_least("training.max_grad_norm", self.max_grad_norm, 0)
        if self.tokens_per_batch is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                "training.gradient_accumulation_steps must be 1 with training.tokens_per_batch, which sets it"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"training.distillation_weight must be between 0 and 1, got {self.distillation_weight}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"training.distillation_temperature must be above 0, got {self.distillation_temperature}")


@dataclass(frozen=True)
class Recipe:
    """One training run of a language model.

    Args:
        model: the model to start from.
        training: how to train.
        data: the text.
        conversion: how to convert it first; null trains the model as it is (the dense control).
        task: distinguishes recipes of language models from others.
    """

    model: ModelRecipe
    training: TrainingRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    conversion: ConversionRecipe | None = None
    task: Literal["language"] = "language"

    def __post_init__(self) -> None:
        if self.conversion is not None and self.model.from_scratch is not None:
            raise ValueError("conversion is for pretrained models: give model.from_scratch.moh instead")
