"""What a training run of any family needs around the Trainer: arguments, precision, resumption, saving.

Not for what is trained on which data: each family has a `run` of its own. Works as it is under `torchrun`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from moh._files import write_text
from moh.training.checkpoints import (
    check_writable,
    is_of_deepspeed,
    last_complete_checkpoint,
    replacing_directory,
    trainer_state,
)
from moh.training.precision import Precision, choose_precision
from moh.training.recipe_file import dump_recipe, load_recipe
from moh.training.settings import TrainingSettings

_RECIPE_FILE = "recipe.yaml"
_IDENTITY_FILE = "data.json"
_BATCH_FILE = "batch.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training run of any family leaves.

    Attributes:
        model_dir: where the model is saved.
        log_history: every logged entry, those before an interruption included.
        precision: "bf16" or "fp32", as used.
        resumed_from: the checkpoint from which the run went on, or None.
    """

    model_dir: Path
    log_history: list[dict[str, Any]]
    precision: str
    resumed_from: Path | None

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of every entry."""
        return [(int(entry["step"]), float(entry["loss"])) for entry in self.log_history if "loss" in entry]


@dataclass(frozen=True)
class Session:
    """One run of a recipe, new or gone on with.

    Attributes:
        recipe: the run.
        arguments: of the Trainer.
        checkpoint: the complete checkpoint to go on from, or None.
    """

    recipe: Any
    arguments: TrainingArguments
    checkpoint: Path | None

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.training.output_dir)

    @property
    def precision(self) -> Precision:
        return "bf16" if self.arguments.bf16 else "fp32"

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the recipe's last step."""
        steps: int = self.recipe.training.max_steps
        return self.checkpoint is not None and trainer_state(self.checkpoint)["global_step"] >= steps

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimiser step, over all processes."""
        arguments = self.arguments
        return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)

    def write_recipe(self) -> None:
        """Write the recipe, with the precision that was chosen, and the batch beside the checkpoints; the first process does.

        Raises:
            ValueError: the run that is gone on with had another number of samples per step. It is found again by steps, so
                samples would be skipped, or seen twice.
        """
        file = self.output_dir / _BATCH_FILE
        if self.checkpoint is not None and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))["samples_per_step"]
            if before != self.samples_per_step:
                raise ValueError(
                    f"the run in {self.output_dir} began with {before} samples per optimiser step, over all processes; to go "
                    f"on it needs as many, got {self.samples_per_step}: change per_device_train_batch_size or "
                    "gradient_accumulation_steps with the number of processes, or set training.tokens_per_batch"
                )
        if not self.arguments.should_save:
            return
        training = dataclasses.replace(self.recipe.training, precision=self.precision)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.output_dir / _RECIPE_FILE, dump_recipe(dataclasses.replace(self.recipe, training=training)))
        write_text(file, json.dumps({"samples_per_step": self.samples_per_step}) + "\n")

    def check_unchanged(self, identity: Mapping[str, Any], changed: str) -> None:
        """Check that a run that is gone on with began with the same data, by what `write_identity` left.

        Args:
            identity: of each part of the data; nothing is compared if it is empty.
            changed: the message, in which {name} stands for the part that is another one.

        Raises:
            ValueError: going on would mix two runs.
        """
        file = self.output_dir / _IDENTITY_FILE
        if self.checkpoint is None or not identity or not file.exists():
            return
        for name, before in json.loads(file.read_text(encoding="utf-8")).items():
            if identity.get(name) != before:
                raise ValueError(
                    f"{changed.format(name=name)} since the run in {self.output_dir} began: choose another "
                    "training.output_dir, or delete it to start anew"
                )

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Leave what `check_unchanged` compares with, if there is anything; only the first process does."""
        if identity and self.arguments.should_save:
            write_text(self.output_dir / _IDENTITY_FILE, json.dumps(identity, indent=1) + "\n")

    def run(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Train to the recipe's last step; returns the log, entries from before an interruption included.

        Raises:
            ValueError: one of the checkpoint and this run is of DeepSpeed, and the other is not.
        """
        checkpoint = self.checkpoint
        if checkpoint is not None and self.finished:
            history: list[dict[str, Any]] = trainer_state(checkpoint)["log_history"]
            return history  # the Trainer would train one step more
        if checkpoint is not None and (wrote := is_of_deepspeed(checkpoint)) != trainer.is_deepspeed_enabled:
            # Unsaid, the Trainer would begin with a new optimiser where DeepSpeed is missing.
            raise ValueError(
                f"the optimiser's states in {checkpoint} were written {'by' if wrote else 'without'} DeepSpeed: go on "
                f"{'with' if wrote else 'without'} it, or choose another training.output_dir"
            )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return list(trainer.state.log_history)


def open_session(recipe: Any) -> Session:
    """Look at the recipe's `training.output_dir` and prepare to start, or to go on from its last complete checkpoint.

    Raises:
        ValueError: the directory can't be written or holds another recipe's checkpoints, or the settings don't fit.
    """
    settings: TrainingSettings = recipe.training
    output_dir = Path(settings.output_dir)
    check_writable(output_dir, name="training.output_dir")
    checkpoint = last_complete_checkpoint(output_dir)
    before = _earlier_recipe(recipe, output_dir) if checkpoint is not None else None
    return Session(recipe, training_arguments(settings, precision=_precision(settings, before)), checkpoint)


def training_arguments(settings: TrainingSettings, *, precision: str) -> TrainingArguments:
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
        # Else what `accelerate launch` was configured with would overrule a recipe in fp32
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):
            arguments = TrainingArguments(**{**defaults, **same, **settings.extra})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU per process: several are for torchrun, not for nn.DataParallel
    # With ZeRO-3 transformers would make every model in shards, by all processes together, whatever accelerate's
    # zero3_init_flag says; here whole models are read, and converted by one process. The Trainer sets it again.
    unset_hf_deepspeed_config()
    return arguments


def _precision(settings: TrainingSettings, before: Any) -> str:
    """As asked; else as the interrupted run had it; else measured, on the first process for all of them."""
    if settings.precision != "auto":
        return settings.precision
    if before is not None:
        return str(before.training.precision)
    from accelerate.utils import broadcast_object_list

    device = training_arguments(settings, precision="fp32").device  # joins the processes of torchrun, if there are any
    return str(broadcast_object_list([choose_precision(device)])[0])


def _earlier_recipe(recipe: Any, output_dir: Path) -> Any:
    """The recipe whose checkpoints lie in `output_dir`.

    Raises:
        ValueError: it differs in anything but how to train, so that going on from there would mix two runs.
    """
    file = output_dir / _RECIPE_FILE
    if not file.exists():
        return None
    before = load_recipe(file)
    for section in [f.name for f in dataclasses.fields(recipe) if f.name != "training"]:
        old, new = getattr(before, section, None), getattr(recipe, section)
        if old != new:
            raise ValueError(
                f"training.output_dir {output_dir} holds checkpoints of another recipe ({section} was {old}, is {new}): "
                "choose another directory, or delete it to start anew"
            )
    return before


@contextmanager
def saving(trainer: Trainer, target: Path, *, holding: str = "config.json") -> Iterator[Path]:
    """Yield a temporary directory to save the trained model in, moved to `target` if all ends well.

    Every process takes part, because a sharded model is gathered by all; only the first one's files count.
    `holding` is the file by which an earlier result, which may be replaced, is known.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with replacing_directory(target, writes=trainer.args.should_save, holding=holding) as scratch:
        trainer.accelerator.wait_for_everyone()
        yield scratch
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.wait_for_everyone()
