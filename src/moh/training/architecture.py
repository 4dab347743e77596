"""A language model to train from scratch, as data: sizes, heads and tokenizer; validated with the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moh.training.settings import at_least


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
        num_attention_heads: h, each of width C / h.
        num_key_value_heads: heads of keys and values; null means h.
        max_position_embeddings: the longest sequence that the model supports.
        vocab_size: rows of the embedding; null means the tokenizer's. Without a tokenizer, the size of the new one.
        tokenizer: directory or hub name; null makes a byte-level BPE tokenizer from the training text.
        tie_word_embeddings: use the embedding as the output layer too.
        moh: the heads of each layer; null makes a dense model.
        extra: more arguments of `transformers.LlamaConfig`, by name.
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

    def check(self) -> None:
        """Check what needs no transformers; called by the recipe, because the parser hides errors of its parts.

        Raises:
            ValueError: a number is out of range; names the field.
        """
        name = "model.from_scratch"
        for number in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
            at_least(f"{name}.{number}", getattr(self, number), 1)
        at_least(f"{name}.max_position_embeddings", self.max_position_embeddings, 2)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{name}.hidden_size must be a multiple of num_attention_heads = {self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.tokenizer is None and self.vocab_size is None:
            raise ValueError(f"{name} needs a tokenizer, or the vocab_size of the one to make from the training text")
        if self.vocab_size is not None:
            at_least(f"{name}.vocab_size", self.vocab_size, 1)
