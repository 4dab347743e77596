"""What a training run of any family needs around the Trainer: arguments, precision, resumption, saving.

Each family's `run` adds its model and data. Also works under `torchrun`.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list, patch_environment
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import is_torch_tf32_available

from moh._files import (
    MODEL_FILES,
    PIPELINE_FILES,
    check_replaceable,
    check_writable,
    locked,
    replacing_directory,
    write_text,
)
from moh.models.card import layers_of, write_card
from moh.models.kinds import looks_local
from moh.training.checkpoints import check_shards, is_of_deepspeed, last_complete_checkpoint, trainer_state
from moh.training.recipes import TrainingSettings, dump_recipe, load_recipe

_RECIPE_FILE = "recipe.yaml"
_IDENTITY_FILE = "data.json"
_BATCH_FILE = "batch.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a training run of any family.

    Attributes:
        model_dir: where the model is saved.
        log_history: every logged entry, including those before an interruption.
        precision: "bf16", "fp16", "tf32" or "fp32", as used.
        resumed_from: the checkpoint that the run resumed from, or None.
    """

    model_dir: Path
    log_history: list[dict[str, Any]]
    precision: str
    resumed_from: Path | None

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of every entry with one; the last step has one unless `extra` turned logging off."""
        return [(int(entry["step"]), float(entry["loss"])) for entry in self.log_history if "loss" in entry]


@dataclass(frozen=True)
class Session:
    """One run of a recipe, new or resumed.

    Attributes:
        recipe: the run.
        arguments: the Trainer's.
        checkpoint: the complete checkpoint to resume from, or None.
        begun: whether this run was started before, perhaps without a checkpoint; results in `output_dir` are then its own.
    """

    recipe: Any
    arguments: TrainingArguments
    checkpoint: Path | None
    begun: bool = False

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.training.output_dir)

    @property
    def precision(self) -> Precision:
        """As used: "tf32" only where this machine has it."""
        return (
            "bf16"
            if self.arguments.bf16
            else "fp16"
            if self.arguments.fp16
            else "tf32"
            if self.arguments.tf32
            else "fp32"
        )

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the recipe's last step."""
        steps: int = self.recipe.training.max_steps
        return self.checkpoint is not None and trainer_state(self.checkpoint)["global_step"] >= steps

    @property
    def samples_per_step(self) -> int:
        """Samples per optimiser step, over all processes."""
        arguments = self.arguments
        return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)

    def write_recipe(self) -> None:
        """Write the recipe, with the chosen precision, and the batch next to the checkpoints, in the first process only.

        Raises:
            ValueError: the interrupted run used a different number of samples per step. Its position is counted in steps,
                so resuming would skip or repeat samples.
        """
        file = self.output_dir / _BATCH_FILE
        if self.checkpoint is not None and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))["samples_per_step"]
            if before != self.samples_per_step:
                raise ValueError(
                    f"the run in {self.output_dir} began with {before} samples per optimiser step, over all processes; "
                    f"resuming needs as many, got {self.samples_per_step}: change per_device_train_batch_size or "
                    "gradient_accumulation_steps with the number of processes, or set training.tokens_per_batch"
                )
        if not self.arguments.should_save:
            return
        training = dataclasses.replace(self.recipe.training, precision=self.precision)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"samples_per_step": self.samples_per_step}) + "\n")  # first: it marks a run
        write_text(self.output_dir / _RECIPE_FILE, dump_recipe(dataclasses.replace(self.recipe, training=training)))

    def check_unchanged(self, identity: Mapping[str, Any], changed: str) -> None:
        """Check that a resumed run began with the same data, as recorded by `write_identity`.

        Args:
            identity: by part of the data; if empty, nothing is compared.
            changed: the message, in which {name} stands for the part that has changed.

        Raises:
            ValueError: the data differs, so resuming would mix two runs.
        """
        file = self.output_dir / _IDENTITY_FILE
        if self.checkpoint is None or not identity or not file.exists():
            return
        for name, before in json.loads(file.read_text(encoding="utf-8")).items():
            if identity.get(name) != before:
                raise ValueError(
                    f"{changed.format(name=name)} since the run in {self.output_dir} began: choose another "
                    "training.output_dir, or delete it to start over"
                )

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Record what `check_unchanged` compares with, in the first process only."""
        if identity and self.arguments.should_save:
            write_text(self.output_dir / _IDENTITY_FILE, json.dumps(identity, indent=1) + "\n")

    def run(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Train to the recipe's last step; returns the log, including entries from before an interruption.

        Raises:
            ValueError: only one of the checkpoint and this run uses DeepSpeed, or another process trains in the directory.
        """
        checkpoint = self.checkpoint
        if checkpoint is not None and self.finished:
            state = trainer_state(checkpoint)  # read here, because the Trainer would train one more step
            trainer.state.log_history, trainer.state.global_step = state["log_history"], state["global_step"]
            return list(trainer.state.log_history)
        if checkpoint is not None and (wrote := is_of_deepspeed(checkpoint)) != trainer.is_deepspeed_enabled:
            # Without this check the Trainer would start with a new optimiser where DeepSpeed is missing.
            raise ValueError(
                f"the optimiser's states in {checkpoint} were written {'by' if wrote else 'without'} DeepSpeed: resume "
                f"{'with' if wrote else 'without'} it, or choose another training.output_dir"
            )
        # Two runs would write each other's checkpoints; the processes of one are the first one's business
        with locked(self.output_dir / "checkpoints", waits=False) if self.arguments.should_save else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return list(trainer.state.log_history)


def open_session(recipe: Any) -> Session:
    """Inspect the recipe's `training.output_dir` and prepare to start, or to resume from its last complete checkpoint.

    Raises:
        ValueError: the directory can't be written or holds another recipe's checkpoints or files that the run would
            replace, its checkpoint could run code when it is read, or a setting is wrong.
    """
    settings: TrainingSettings = recipe.training
    output_dir = Path(settings.output_dir)
    check_writable(output_dir, name="training.output_dir")
    begun = (output_dir / _BATCH_FILE).is_file()
    kinds = PIPELINE_FILES if recipe.task == "diffusion" else MODEL_FILES
    check_replaceable(output_dir / "model", name="training.output_dir: its", kinds=kinds, known=begun)
    for pattern in (_RECIPE_FILE, _IDENTITY_FILE, "checkpoint-*"):
        if not begun and (others := sorted(output_dir.glob(pattern))):
            raise ValueError(
                f"training.output_dir {output_dir} must be new or a run's of this package: {others[0].name} is not, and a run "
                "would replace it: choose another directory"
            )
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        check_shards(checkpoint)
    before = _earlier_recipe(recipe, output_dir) if checkpoint is not None else None
    session = Session(recipe, training_arguments(settings, precision=_precision(settings, before)), checkpoint, begun)
    if before is not None and session.precision != before.training.precision and session.arguments.should_save:
        warnings.warn(
            f"the run in {output_dir} began in {before.training.precision} and resumes in {session.precision}: set "
            f"training.precision to {before.training.precision} to compute the rest as before",
            stacklevel=2,
        )
    return session


def training_arguments(settings: TrainingSettings, *, precision: str) -> TrainingArguments:
    """The transformers arguments of a recipe; `settings.extra` may add to them and change the defaults below.

    Raises:
        ValueError: `extra` has an unknown name, or one that is a field of the recipe; or "fp16" without a GPU.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("training.precision fp16 needs a GPU, got a machine without one: set bf16 or fp32")
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    own = {f.name for f in dataclasses.fields(settings)} | _SWITCHES
    for name in settings.extra:
        if name in own:
            field = "precision" if name in _SWITCHES else name
            raise ValueError(f"training.extra must not set {name}: set training.{field}")
        if name not in known:
            raise ValueError(f"training.extra: transformers.TrainingArguments has no argument {name!r}")
    same = {name: getattr(settings, name) for name in (own & known) - _SWITCHES - {"gradient_checkpointing"}}
    defaults: dict[str, Any] = {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        # None leaves torch's setting, which is the process's, so that "fp32" turns off what a run before it turned on
        "tf32": {"tf32": True, "fp32": False}.get(precision) if is_torch_tf32_available() else None,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise torchrun on CPUs trains one model per process
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
        # Otherwise the configuration of `accelerate launch` would override a recipe in fp32
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):
            arguments = TrainingArguments(**{**defaults, **same, **settings.extra})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU per process: torchrun, not nn.DataParallel, uses several
    # With ZeRO-3 transformers would create every model sharded over all processes, whatever accelerate's
    # zero3_init_flag; here models are loaded whole, and one process converts. The Trainer sets it again.
    unset_hf_deepspeed_config()
    return arguments


def _precision(settings: TrainingSettings, before: Any) -> str:
    """As requested; else as in the interrupted run; else measured by the first process for all."""
    if settings.precision != "auto":
        return settings.precision
    if before is not None:
        return str(before.training.precision)
    device = training_arguments(settings, precision="fp32").device  # joins the processes of torchrun, if there are any
    return str(broadcast_object_list([choose_precision(device)])[0])


def _earlier_recipe(recipe: Any, output_dir: Path) -> Any:
    """The recipe whose checkpoints are in `output_dir`, None if it was not recorded.

    Raises:
        ValueError: it differs in more than `training`, so resuming would mix two runs.
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
                "choose another directory, or delete it to start over"
            )
    return before


@contextmanager
def saving(trainer: Trainer, target: Path, *, kinds: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """Yield a temporary directory to save the trained model in; it is moved to `target` if the block succeeds.

    Every process takes part, because gathering a sharded model needs all; only the first one's files count. `kinds` are
    the files that are written: what else an earlier result holds is not deleted (`check_replaceable`).
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    (tag,) = broadcast_object_list([secrets.token_hex(4)])  # all processes save to one directory
    with replacing_directory(target, writes=trainer.args.should_save, kinds=kinds, known=True, tag=tag) as scratch:
        trainer.accelerator.wait_for_everyone()
        yield scratch
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.wait_for_everyone()


def save_card(
    recipe: Any,
    model: nn.Module,
    directory: Path,
    *,
    base: str | None,
    data: Sequence[str],
    results: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write the card of a trained MoH model; a dense control has none.

    Args:
        recipe: the run.
        model: the trained model.
        directory: where it has been saved.
        base: the model that training started from, None for random weights.
        data: names or paths of what it was trained on; of a path only the last part is shown.
        results: as in `moh.models.card.write_card`.
    """
    if layers := layers_of(model):
        names = ", ".join(Path(name).name if looks_local(name) else name for name in data)
        facts = {"trained on": names, "optimiser steps": f"{recipe.training.max_steps:,}"}
        write_card(directory, layers, base=base, facts=facts, results=results)


Precision = Literal["bf16", "fp16", "tf32", "fp32"]
_SWITCHES = {"bf16", "fp16"}  # the arguments of transformers that `training.precision` sets

_SIZE = 384  # of the square matrices: a few milliseconds even where bfloat16 is emulated, and a fair sample
_WORTH = 1.2  # bfloat16 has to be this much faster: the casts around a matrix product take time too


def choose_precision(device: torch.device | None = None) -> Literal["bf16", "fp32"]:
    """ "bf16" or "fp32", for `device` (None: the GPU if there is one).

    On a GPU, bfloat16 if supported. On a CPU both are timed, in a few milliseconds: some CPUs have bfloat16
    instructions, others emulate it, ten times slower than float32.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if _seconds(torch.bfloat16) * _WORTH < _seconds(torch.float32) else "fp32"


def without_autocast(model: nn.Module) -> nn.Module:
    """`model` with its own `forward` again, without the autocast that accelerate wraps around it.

    A trained model then computes like one that was saved and loaded. accelerate's own `keep_fp32_wrapper=False` also
    removes the decorators of transformers' models, and binds what is left twice (1.15).
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original  # the instance had its own `forward` before
    return model


def _seconds(dtype: torch.dtype) -> float:
    """Shortest of five timings of a matrix product on the CPU."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one prepares the kernel
