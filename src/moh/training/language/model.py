"""A recipe's model, in float32, loaded and converted or new; and the check that text and model match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from moh._files import replacing_directory
from moh.data.text.blocks import start_tokens
from moh.data.text.named import calibration_texts
from moh.data.text.tokenising import byte_pair_tokenizer
from moh.models.transformers import MoHLlamaConfig
from moh.models.transformers.families import supported_positions
from moh.models.transformers.loading import load_causal_lm, load_config
from moh.models.transformers.loading import load_tokenizer as _load_tokenizer
from moh.routing import router_class
from moh.training.language.data import TrainingText, cache_directory, open_sources
from moh.training.language.recipe import FromScratchRecipe, Recipe

_MOST_PADDING = 2048
"""Most rows of an embedding beyond the tokenizer's ids: no model pads more, so the tokenizer would be another's."""


def load_dense(path: str) -> PreTrainedModel:
    """Load the pretrained model of a recipe in float32 (autocast, not the weights, makes training cheaper).

    Raises:
        ValueError: transformers can't load the model.
    """
    try:
        return load_causal_lm(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unloadable("model.path", path, error) from None


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's model, pretrained or new.

    Raises:
        ValueError: transformers can't load the tokenizer, or it can't be made from the text.
    """
    new = recipe.model.from_scratch
    if new is not None and new.tokenizer is None:
        assert new.vocab_size is not None
        return byte_pair_tokenizer(open_sources(recipe.data), new.vocab_size, cache_directory(recipe.data))
    path = recipe.model.path if new is None else new.tokenizer
    assert path is not None
    try:
        return _load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise _unloadable("model.path" if new is None else "model.from_scratch.tokenizer", path, error) from None


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the recipe's model, without its weights.

    Raises:
        ValueError: transformers can't load it, or the sizes of a new model don't match.
    """
    if recipe.model.from_scratch is not None:
        return new_config(recipe.model.from_scratch, tokenizer)
    assert recipe.model.path is not None
    try:
        return load_config(recipe.model.path)
    except (OSError, ValueError) as error:
        raise _unloadable("model.path", recipe.model.path, error) from None


def new_config(recipe: FromScratchRecipe, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The configuration of a new model: Llama's, or `MoHLlamaConfig` where the recipe has MoH heads.

    Raises:
        ValueError: the heads don't add up, or `extra` has an argument that the configuration lacks.
    """
    names = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads"
    names += " max_position_embeddings tie_word_embeddings"
    fields = {name: getattr(recipe, name) for name in names.split()}
    fields |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    fields["vocab_size"] = recipe.vocab_size or largest_id(tokenizer) + 1
    if recipe.moh is not None:
        names = "shared_heads active_heads router routing_unit"
        fields |= {name: getattr(recipe.moh, name) for name in names.split()}
    kind = LlamaConfig if recipe.moh is None else MoHLlamaConfig
    for name in recipe.extra:
        if name in fields:
            raise ValueError(f"model.from_scratch.extra must not set {name}: it has its own field")
        if not hasattr(kind(), name):
            raise ValueError(f"model.from_scratch.extra: {kind.__name__} has no argument {name!r}")
    try:
        return kind(**fields, **recipe.extra)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.from_scratch: {' '.join(str(error).split())}") from None


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Let training change only the parameters that have one of `names` between the dots of their own.

    What the caller has frozen stays frozen.

    Raises:
        ValueError: a name is not a part of any parameter's (the message has those that are), or all these are frozen.
    """
    parts = {name: set(name.split(".")) for name, _ in model.named_parameters()}
    known = {part for of_one in parts.values() for part in of_one if not part.isdigit()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"training.only must hold parts of parameters' names of {type(model).__name__}, which are "
                f"{', '.join(sorted(known))}; got {name!r}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not parts[name].isdisjoint(names))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"training.only must name parameters that are not frozen, got {', '.join(names)}")


def check_fits(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, lengths: Mapping[str, int]) -> None:
    """Check that the model has rows for the tokenizer's ids and positions for sequences of these `lengths`, by field.

    Raises:
        ValueError: the vocabularies differ, or a length is above the model's positions.
    """
    tokens, rows = largest_id(tokenizer) + 1, config.get_text_config().vocab_size
    if not tokens <= rows <= tokens + _MOST_PADDING:
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the model a vocabulary of {rows}: the model must have as many, or up "
            f"to {_MOST_PADDING} more for padding"
        )
    positions = supported_positions(config)
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise ValueError(f"{name} must be at most the model's max_position_embeddings = {positions}, got {length}")


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id, which with gaps in the vocabulary exceeds the number of tokens."""
    return int(max(tokenizer.get_vocab().values()))


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    text: TrainingText,
    arguments: TrainingArguments,
    *,
    resuming: bool = False,
) -> PreTrainedModel:
    """Load the recipe's model, converted if the recipe has a conversion, or make a new one.

    Under torchrun one process converts and the others load its result, so that all have the same heads. A new model's
    weights depend only on the seed. `resuming` is for a run resumed from a sharded checkpoint, which holds weights but
    no configuration: it uses the model that was converted at the run's start.
    """
    if recipe.model.from_scratch is not None:
        torch.manual_seed(recipe.training.seed)
        return AutoModelForCausalLM.from_config(new_config(recipe.model.from_scratch, tokenizer), dtype=torch.float32)
    assert recipe.model.path is not None
    if recipe.conversion is None:
        return load_dense(recipe.model.path)
    if arguments.world_size == 1:
        return _convert(recipe, text, tokenizer)
    target = Path(arguments.output_dir) / "converted"
    if resuming and (target / "config.json").exists():
        return load_causal_lm(target, dtype=torch.float32)
    with arguments.main_process_first(local=False, desc="converting the model"):
        if arguments.process_index == 0:
            with replacing_directory(target) as scratch:
                _convert(recipe, text, tokenizer).save_pretrained(scratch)
    return load_causal_lm(target, dtype=torch.float32)


def _convert(recipe: Recipe, text: TrainingText, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from moh.conversion import convert
    from moh.conversion.transformers import default_lengths

    assert recipe.conversion is not None and recipe.model.path is not None
    settings = recipe.conversion
    dense = load_dense(recipe.model.path)
    calibration: Tensor | list[str] | list[list[int]] | None = None
    if router_class(settings.router).is_fitted:
        if settings.calibration:
            calibration = calibration_texts(settings.calibration, tokenizer=tokenizer, cache_dir=recipe.data.cache_dir)
        else:
            tokens = settings.calibration_tokens
            longest = max(settings.calibration_length or default_lengths(dense, tokens))
            calibration = text.calibration(tokens, longest, start_tokens(tokenizer))
    return convert(
        dense,
        share=settings.share,
        shared_heads=settings.shared_heads,
        active_heads=settings.active_heads,
        router=settings.router,
        routing_unit=settings.routing_unit,
        calibration=calibration,
        tokenizer=tokenizer,
        calibration_tokens=settings.calibration_tokens,
        seq_len=settings.calibration_length or None,
        allocation=settings.allocation,
        refit_output=settings.refit_output,
        copy_weights=False,
    )


def _unloadable(name: str, path: str, error: Exception) -> ValueError:
    return ValueError(f"{name} {path!r} can't be loaded: {' '.join(str(error).split())}")
