"""One training run of a diffusion model, from a recipe to a saved model: images, latents, Trainer.

The steps themselves are the Trainer's (`moh.training.diffusion.trainer`). Also runs under `torchrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL
from transformers import TrainerCallback, TrainingArguments, set_seed

from moh._files import PIPELINE_FILES
from moh.data.images.sources import ImageSource, take
from moh.models.diffusers import MoHDiTTransformer2DModel, create_dit
from moh.sampling import ImageModel, diffusion_scheduler, load_vae, save_image_model
from moh.training.diffusion.data import PixelDataset, load_source
from moh.training.diffusion.latents import LatentDataset, encode_latents
from moh.training.diffusion.recipe import DiffusionRecipe
from moh.training.diffusion.trainer import Denoiser, DiffusionTrainer
from moh.training.session import RunResult, open_session, save_card, saving


@dataclass(frozen=True, kw_only=True)
class DiffusionResult(RunResult):
    """The result of a run; adds the model to `RunResult`.

    Attributes:
        model: the trained model with the averaged weights, in evaluation mode, ready for `moh.sampling.sample`.
    """

    model: ImageModel


def train(
    recipe: DiffusionRecipe,
    *,
    images: ImageSource | None = None,
    vae: AutoencoderKL | None = None,
    transformer: MoHDiTTransformer2DModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> DiffusionResult:
    """Run a recipe; if `output_dir` holds complete checkpoints of the same recipe, resume from the last one.

    Args:
        recipe: the run.
        images: labelled images instead of the recipe's.
        vae: instead of the recipe's.
        transformer: a model to train instead of the recipe's preset; it must fit the data.
        callbacks: more callbacks of the transformers Trainer.

    Raises:
        ValueError: a field of the recipe is wrong or unsupported; names it, and is raised before training.
    """
    session = open_session(recipe)
    settings, arguments, checkpoint = recipe.training, session.arguments, session.checkpoint
    if arguments.fsdp:
        raise ValueError("training.extra must not set fsdp: averaged weights of sharded models are not supported")
    if arguments.label_smoothing_factor:
        raise ValueError("training.extra must not set label_smoothing_factor: a diffusion model predicts no labels")
    if vae is None and recipe.data.vae is not None:
        vae = load_vae(recipe.data.vae)
    if images is None:
        with arguments.main_process_first(desc="fetching the images"):
            images = load_source(recipe.data)
    pixels = PixelDataset(images, recipe.data.image_size)
    _check(recipe, pixels, arguments)
    identity = {"images": pixels.digest}
    session.check_unchanged(identity, "data.dataset: the {name} have changed")
    set_seed(settings.seed)  # for new weights
    if transformer is None:
        transformer = _create(recipe, pixels, vae)
    dataset: PixelDataset | LatentDataset = pixels
    if vae is not None:
        folder = None if recipe.data.latents is None else Path(recipe.data.latents)
        dataset = encode_latents(vae, pixels, folder=folder, flip=recipe.data.flip, cache_dir=recipe.data.cache_dir)
        vae.to(arguments.device)
    session.write_recipe()
    session.write_identity(identity)

    process = recipe.diffusion
    scheduler = diffusion_scheduler(
        clip=vae is None,
        train_steps=process.train_steps,
        beta_schedule=process.beta_schedule,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
    )
    model = ImageModel(transformer, scheduler, vae, pixels.classes)
    trainer = DiffusionTrainer(
        model=Denoiser(transformer),
        args=_fitting(arguments, transformer, settings.workers),
        train_dataset=dataset,
        data_collator=take,
        callbacks=list(callbacks),
        image_model=model,
        settings=settings,
        flip=recipe.data.flip,
        balance_loss_scope=settings.balance_loss_scope,
    )
    if checkpoint is not None:
        trainer.load_average(checkpoint)
    history = session.run(trainer)
    transformer.load_state_dict(trainer.average.module.state_dict())
    model_dir = session.output_dir / "model"
    with saving(trainer, model_dir, kinds=PIPELINE_FILES) as scratch:
        if arguments.should_save:
            save_image_model(model, scratch)
            save_card(recipe, transformer, scratch, base=None, data=[recipe.data.dataset])
    return DiffusionResult(
        model=model,
        model_dir=model_dir,
        log_history=history,
        precision=session.precision,
        resumed_from=checkpoint,
    )


def _create(recipe: DiffusionRecipe, pixels: PixelDataset, vae: AutoencoderKL | None) -> MoHDiTTransformer2DModel:
    """The recipe's model, in the sizes of the data."""
    channels, size = pixels.sample_shape[0], pixels.image_size
    if vae is not None:
        channels, size = vae.config.latent_channels, size // 2 ** (len(vae.config.block_out_channels) - 1)
    return create_dit(
        recipe.model.preset,
        num_classes=len(pixels.classes),
        in_channels=channels,
        sample_size=size,
        **recipe.model.overrides,
    )


def _check(recipe: DiffusionRecipe, pixels: PixelDataset, arguments: TrainingArguments) -> None:
    """Raise a ValueError if there are too few images for the batch, or no such class to sample."""
    needed = arguments.per_device_train_batch_size * arguments.world_size
    if len(pixels) < needed:
        raise ValueError(
            f"there are {len(pixels)} training images, fewer than the {needed} that one forward pass reads: lower "
            "training.per_device_train_batch_size"
        )
    for label in recipe.training.samples.classes:
        if not 0 <= label < len(pixels.classes):
            raise ValueError(f"training.samples.classes must be between 0 and {len(pixels.classes) - 1}, got {label}")


def _fitting(arguments: TrainingArguments, transformer: MoHDiTTransformer2DModel, workers: int) -> TrainingArguments:
    """The arguments, adapted to a model and data that are not transformers' own."""
    arguments.remove_unused_columns = False  # the batches have no columns
    arguments.ddp_find_unused_parameters = False
    arguments.dataloader_num_workers = workers
    for word in ("activation", "gradient"):  # renamed in transformers 5.2x
        if getattr(arguments, f"{word}_checkpointing", False):
            setattr(arguments, f"{word}_checkpointing", False)
            transformer.enable_gradient_checkpointing()
    return arguments
