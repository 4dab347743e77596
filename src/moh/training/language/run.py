"""One training run of a language model, from a recipe to a saved model: text, conversion, Trainer.

The steps themselves are the transformers Trainer's (`moh.training.language.trainer`). Also runs under `torchrun`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import is_fsdp_enabled

from moh.data.text.blocks import TokenBlocks
from moh.data.text.streaming import StreamedMixture
from moh.models.transformers.loading import mend_generation_config
from moh.training.checkpoints import has_sharded_weights, load_sharded_weights
from moh.training.language.data import TrainingText, prepare_text
from moh.training.language.model import build_model, check_fits, load_dense, load_tokenizer, model_config, train_only
from moh.training.language.recipe import Recipe
from moh.training.language.trainer import MoHTrainer, stream_position
from moh.training.session import RunResult, open_session, save_card, saving, without_autocast


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """The result of a run; adds model and tokenizer to `RunResult`.

    Attributes:
        model: the trained model, in evaluation mode.
        tokenizer: its tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def train(
    recipe: Recipe,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_blocks: Tensor | None = None,
    heldout_blocks: Tensor | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Run a recipe; if `output_dir` holds complete checkpoints of the same recipe, resume from the last one.

    Args:
        recipe: the run.
        model: a model to train instead of the recipe's, which is then not converted.
        tokenizer: instead of the recipe's.
        train_blocks: `[n, seq_len]` token ids, instead of the recipe's text. Without `conversion.calibration` a conversion
            reads up to `calibration_tokens` of them, in these blocks whatever `calibration_length` is.
        heldout_blocks: `[m, seq_len]`, evaluated if `training.extra` sets an `eval_strategy`.
        teacher: the dense original for distillation, instead of the recipe's model.
        callbacks: more callbacks of the transformers Trainer.

    Raises:
        ValueError: a field of the recipe is wrong or unsupported; names it, and is raised before training.
    """
    session = open_session(recipe)
    if model is not None:
        mend_generation_config(model)
    settings, arguments, checkpoint = recipe.training, session.arguments, session.checkpoint
    if settings.tokens_per_batch is not None:
        arguments.gradient_accumulation_steps = _accumulation(recipe, arguments)
    if tokenizer is None:
        with arguments.main_process_first(desc="making the tokenizer"):  # fetches the text that it is made from
            tokenizer = load_tokenizer(recipe)
    if settings.distillation_weight and is_fsdp_enabled():  # transformers then reads weights in the first process only
        raise ValueError(
            "training.distillation_weight must be 0 with fsdp_cpu_ram_efficient_loading: the dense original would be empty "
            "on all processes but the first"
        )
    if settings.distillation_weight and teacher is None and recipe.model.path is None:
        raise ValueError("training.distillation_weight must be 0 with model.from_scratch: there is no dense original")
    if train_blocks is None:
        lengths = {"data.seq_len": recipe.data.seq_len}
        if model is None and recipe.conversion is not None:
            lengths["conversion.calibration_length"] = max(recipe.conversion.calibration_length, default=0)
        check_fits(model.config if model is not None else model_config(recipe, tokenizer), tokenizer, lengths)
        text = prepare_text(recipe, tokenizer, arguments)
    else:
        text = TrainingText(TokenBlocks(train_blocks), None if heldout_blocks is None else TokenBlocks(heldout_blocks))
    _check_enough(text, arguments)
    session.check_unchanged(text.identity, "data.sources: {name} or the tokenizer has changed")
    if isinstance(text.train, StreamedMixture):
        _open_stream(text.train, arguments, checkpoint)
    session.write_recipe()
    session.write_identity(text.identity)

    if checkpoint is not None and (checkpoint / "config.json").exists():  # its weights need no conversion
        kind = type(model) if model is not None else AutoModelForCausalLM
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad} if model is not None else set()
        model = kind.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    elif model is None:
        model = build_model(recipe, tokenizer, text, arguments, resuming=checkpoint is not None)
    if settings.only:
        train_only(model, settings.only)
    if checkpoint is not None and session.finished and has_sharded_weights(checkpoint):
        load_sharded_weights(model, checkpoint)  # the Trainer reads them only before a step, and none is left
    if settings.balance_loss_coef and hasattr(model.config, "router_aux_loss_coef"):
        model.config.router_aux_loss_coef = settings.balance_loss_coef
    if settings.distillation_weight and teacher is None and recipe.model.path is not None:
        teacher = load_dense(recipe.model.path)

    implementation = model.config._attn_implementation
    every_gate = recipe.conversion is not None and recipe.conversion.inactive_gate_gradient == "dense"
    if every_gate:
        model.set_attn_implementation("moh_straight_through")
    use_cache = model.config.use_cache
    trainer = MoHTrainer(
        model=model,
        args=arguments,
        train_dataset=text.train,
        eval_dataset=text.heldout,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        teacher=teacher if settings.distillation_weight else None,
        distillation_weight=settings.distillation_weight,
        balance_loss_scope=settings.balance_loss_scope,
        distillation_temperature=settings.distillation_temperature,
    )
    history = session.run(trainer)
    model.config.use_cache = use_cache  # the Trainer turns it off
    if every_gate:
        model.set_attn_implementation(implementation)
    model_dir = session.output_dir / "model"
    _save(trainer, model_dir, recipe, history)
    trained = without_autocast(trainer.accelerator.unwrap_model(trainer.model)).eval()
    return TrainResult(
        model=trained,
        tokenizer=tokenizer,
        model_dir=model_dir,
        log_history=history,
        precision=session.precision,
        resumed_from=checkpoint,
    )


def _accumulation(recipe: Recipe, arguments: TrainingArguments) -> int:
    """Forward passes per optimiser step of `training.tokens_per_batch` tokens."""
    wanted = recipe.training.tokens_per_batch
    once = recipe.data.seq_len * arguments.per_device_train_batch_size * arguments.world_size
    assert wanted is not None
    if wanted % once:
        raise ValueError(
            f"training.tokens_per_batch must be a multiple of {once} = data.seq_len {recipe.data.seq_len} x "
            f"per_device_train_batch_size {arguments.per_device_train_batch_size} x {arguments.world_size} processes, "
            f"got {wanted}"
        )
    return int(wanted // once)


def _check_enough(text: TrainingText, arguments: TrainingArguments) -> None:
    """Check that a corpus in memory fills a forward pass; other data starts again at its end."""
    needed = arguments.per_device_train_batch_size * arguments.world_size
    if isinstance(text.train, TokenBlocks) and len(text.train) < needed:
        blocks = text.train.blocks
        raise ValueError(
            f"the training text fills {len(blocks)} sequences of {blocks.shape[1]} tokens, fewer than the {needed} that "
            "one forward pass reads: lower training.per_device_train_batch_size or data.seq_len, or give more text"
        )


def _open_stream(stream: StreamedMixture, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Let the stream, not the Trainer, find the sequence to resume at."""
    arguments.remove_unused_columns = False  # the stream's state is not an input of the model
    if checkpoint is not None:
        arguments.ignore_data_skip = True
        batch = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        stream.resume(*stream_position(checkpoint, batch))


def _save(trainer: MoHTrainer, target: Path, recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> None:
    """Save model and tokenizer with a model card, whole or not at all."""
    with saving(trainer, target) as scratch:
        trainer.save_model(str(scratch), _internal_call=True)
        if trainer.args.should_save:
            (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has more
            data = recipe.data
            texts = [source.path for source in data.sources] or data.files or [data.corpus]
            losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry][-1:]
            results = [(f"held-out perplexity, step {step:,}", f"{math.exp(loss):.2f}", "–") for step, loss in losses]
            save_card(recipe, trainer.model, scratch, base=recipe.model.path, data=texts, results=results)
