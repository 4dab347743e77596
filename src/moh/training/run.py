"""One training run, from a recipe to a saved model: text, model, conversion, Trainer, resumption.

Everything that happens within a step is the transformers Trainer's (`moh.training.trainer`). Runs under `torchrun` as it is.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moh._extras import require
from moh._files import write_text
from moh.training.checkpoints import check_writable, last_complete_checkpoint, replacing_directory, trainer_state
from moh.training.corpus import Corpus, corpus_from_files, load_corpus
from moh.training.data import TokenBlocks, pack_tokens
from moh.training.loading import build_model, load_dense, load_tokenizer
from moh.training.precision import Precision, choose_precision
from moh.training.recipe import DataRecipe, Recipe, TrainingRecipe, dump_recipe, load_recipe

require("transformers", extra="llm")
require("accelerate", extra="llm")
require("tensorboard", extra="llm")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from moh.training.trainer import MoHTrainer  # noqa: E402

_RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model: the trained model, in evaluation mode.
        tokenizer: its tokenizer.
        model_dir: where both are saved.
        log_history: every logged entry, those before an interruption included.
        precision: "bf16" or "fp32", as used.
        resumed_from: the checkpoint from which the run went on, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_dir: Path
    log_history: list[dict[str, Any]]
    precision: str
    resumed_from: Path | None

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of every entry."""
        return [(int(entry["step"]), float(entry["loss"])) for entry in self.log_history if "loss" in entry]


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
    """Run a recipe; if `output_dir` holds a complete checkpoint of the same recipe, go on from the last one.

    Args:
        recipe: the run.
        model: a model to train in place of the one that the recipe names and converts.
        tokenizer: in place of the recipe's.
        train_blocks: `[n, seq_len]` token ids, in place of the recipe's text.
        heldout_blocks: `[m, seq_len]`, evaluated if `training.extra` sets an `eval_strategy`.
        teacher: the dense original for distillation, in place of the recipe's model.
        callbacks: more callbacks of the transformers Trainer.

    Raises:
        ValueError: something in the recipe can't be served (the message names the field); raised before training.
    """
    settings, output_dir = recipe.training, Path(recipe.training.output_dir)
    check_writable(output_dir, name="training.output_dir")
    checkpoint = last_complete_checkpoint(output_dir)
    before = _earlier_recipe(recipe, output_dir) if checkpoint is not None else None
    arguments = training_arguments(settings, precision=_precision(settings, before))

    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe.model)
    if train_blocks is None:
        train_blocks, heldout_blocks = _blocks(recipe.data, tokenizer, arguments)
    _check_enough(train_blocks, arguments)
    if arguments.should_save:
        _write_recipe(recipe, arguments, output_dir)

    if checkpoint is not None and (checkpoint / "config.json").exists():  # its weights need no conversion
        kind = type(model) if model is not None else AutoModelForCausalLM
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad} if model is not None else set()
        model = kind.from_pretrained(checkpoint, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    elif model is None:
        model = build_model(recipe, train_blocks, arguments)
    if settings.balance_loss_coef and hasattr(model.config, "router_aux_loss_coef"):
        model.config.router_aux_loss_coef = settings.balance_loss_coef
    if settings.distillation_weight and teacher is None:
        teacher = load_dense(recipe.model)

    use_cache = model.config.use_cache
    trainer = MoHTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenBlocks(train_blocks),
        eval_dataset=None if heldout_blocks is None else TokenBlocks(heldout_blocks),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        teacher=teacher if settings.distillation_weight else None,
        distillation_weight=settings.distillation_weight,
        distillation_temperature=settings.distillation_temperature,
    )
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        warnings.warn(
            "training.extra.fsdp has no effect without torchrun and GPUs: weights are not sharded", stacklevel=2
        )
    if checkpoint is not None and trainer_state(checkpoint)["global_step"] >= settings.max_steps:
        history = trainer_state(checkpoint)["log_history"]  # the Trainer would train one step more
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history = trainer.state.log_history
    model.config.use_cache = use_cache  # the Trainer turns it off
    _save(trainer, output_dir / "model")
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    precision = "bf16" if arguments.bf16 else "fp32"
    return TrainResult(trained, tokenizer, output_dir / "model", history, precision, checkpoint)


def training_arguments(settings: TrainingRecipe, *, precision: str) -> TrainingArguments:
    """The transformers arguments of a recipe; `settings.extra` may add to them and change the defaults below.

    Raises:
        ValueError: `extra` has an unknown name, or one that is a field of the recipe.
    """
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    own = {f.name for f in dataclasses.fields(settings)} | {"bf16"}
    for name in settings.extra:
        if name in own:
            raise ValueError(f"training.extra must not set {name}: set training.{name.replace('bf16', 'precision')}")
        if name not in known:
            raise ValueError(f"training.extra: transformers.TrainingArguments has no argument {name!r}")
    same = {name: getattr(settings, name) for name in own & known - {"gradient_checkpointing"} if name != "bf16"}
    defaults = {
        "bf16": precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),  # unsaid, torchrun on CPUs trains one model per process
        "data_seed": settings.seed,  # the order of the data, the same on every process
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,  # every step reads full batches, however many processes share them
        "prediction_loss_only": True,  # held-out logits would fill the memory
        "save_strategy": "steps",
        "report_to": ["tensorboard"],
    }
    if settings.gradient_checkpointing:
        # renamed in transformers 5.2x
        word = "activation" if "activation_checkpointing" in known else "gradient"
        defaults |= {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(**{**defaults, **same, **settings.extra})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU per process: several are for torchrun, not for nn.DataParallel
    return arguments


def load_text(data: DataRecipe) -> Corpus:
    """The text that a recipe names, split."""
    if data.files:
        return corpus_from_files(data.files, data.heldout_files)
    return load_corpus(data.corpus, data.cache_dir)


def _blocks(
    data: DataRecipe, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments
) -> tuple[Tensor, Tensor]:
    with arguments.main_process_first(desc="fetching the text"):
        corpus = load_text(data)
    show = arguments.process_index == 0
    train, heldout = (
        pack_tokens(texts, tokenizer, seq_len=data.seq_len, progress=show) for texts in (corpus.train, corpus.heldout)
    )
    return train, heldout


def _check_enough(blocks: Tensor, arguments: TrainingArguments) -> None:
    needed = arguments.per_device_train_batch_size * arguments.world_size
    if len(blocks) < needed:
        raise ValueError(
            f"the training text fills {len(blocks)} sequences of {blocks.shape[1]} tokens, fewer than the {needed} that "
            "one forward pass reads: lower training.per_device_train_batch_size or data.seq_len, or give more text"
        )


def _precision(settings: TrainingRecipe, before: Recipe | None) -> str:
    """As asked; else as the interrupted run had it; else measured, on the first process for all of them."""
    if settings.precision != "auto":
        return settings.precision
    if before is not None:
        return before.training.precision
    from accelerate.utils import broadcast_object_list

    device = training_arguments(settings, precision="fp32").device  # joins the processes of torchrun, if there are any
    return str(broadcast_object_list([choose_precision(device)])[0])


def _write_recipe(recipe: Recipe, arguments: TrainingArguments, output_dir: Path) -> None:
    """Write the recipe beside the checkpoints, with the precision that was chosen."""
    precision: Precision = "bf16" if arguments.bf16 else "fp32"
    training = dataclasses.replace(recipe.training, precision=precision)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / _RECIPE_FILE, dump_recipe(dataclasses.replace(recipe, training=training)))


def _earlier_recipe(recipe: Recipe, output_dir: Path) -> Recipe | None:
    """The recipe whose checkpoints lie in `output_dir`.

    Raises:
        ValueError: it has another model, conversion or text, so that going on from there would mix two runs.
    """
    file = output_dir / _RECIPE_FILE
    if not file.exists():
        return None
    before = load_recipe(file)
    for section in ("model", "conversion", "data"):
        old, new = getattr(before, section), getattr(recipe, section)
        if old != new:
            raise ValueError(
                f"training.output_dir {output_dir} holds checkpoints of another recipe ({section} was {old}, is {new}): "
                "choose another directory, or delete it to start anew"
            )
    return before


def _save(trainer: MoHTrainer, target: Path) -> None:
    """Save model and tokenizer in a temporary directory, moved into place; every process takes part."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with replacing_directory(target, writes=trainer.args.should_save) as scratch:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(scratch), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml tells more
    trainer.accelerator.wait_for_everyone()
