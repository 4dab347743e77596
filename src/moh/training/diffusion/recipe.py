"""A training run of a diffusion model as data: frozen dataclasses, every field validated once, at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from moh._checks import at_least
from moh.training.recipes import ImageTrainingSettings


@dataclass(frozen=True)
class DiffusionModelRecipe:
    """The model to train.

    Args:
        preset: a preset of `moh.models.diffusers.create_dit`, such as "moh_dit_s_2_90".
        overrides: further arguments of `create_dit`. Classes, channels and size come from the data.
    """

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "sample_size"):
            if name in self.overrides:
                raise ValueError(f"model.overrides must not set {name}: it comes from the data")


@dataclass(frozen=True)
class DiffusionDataRecipe:
    """The labelled images, as pixels or as latents.

    Args:
        dataset: "fashion-mnist"; a directory of class folders, or one that has them in train/; or a Hugging Face data set
            on the hub or on disk.
        image_size: height and width; larger images are resized and cropped to the middle square, smaller ones of
            "fashion-mnist" padded.
        train_split: split of a Hugging Face data set; default train.
        image_column: column of a Hugging Face data set; default the one that holds images.
        label_column: likewise; default the one that holds class labels.
        vae: directory or hub name of an `AutoencoderKL`: train on its latents. null trains on pixels.
        latents: directory where the latents are kept, encoded once; default one in the cache per VAE, data set and size.
        flip: mirror half of the images.
        cache_dir: where fetched data and latents are kept (default ~/.cache/moh).
    """

    dataset: str
    image_size: int
    train_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    vae: str | None = None
    latents: str | None = None
    flip: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("data.dataset must name a data set or a directory")
        at_least("data.image_size", self.image_size, 1)
        if self.latents is not None and self.vae is None:
            raise ValueError("data.latents needs data.vae, whose latents they are")


@dataclass(frozen=True)
class DiffusionProcessRecipe:
    """The diffusion that the model learns to reverse.

    Args:
        train_steps: number of steps.
        beta_schedule: variances of the steps, as in diffusers: "linear", "scaled_linear" or "squaredcos_cap_v2".
        beta_start: the first variance.
        beta_end: the last variance.
    """

    train_steps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        at_least("diffusion.train_steps", self.train_steps, 2)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "diffusion.beta_start and diffusion.beta_end must be between 0 and 1 and not fall, "
                f"got {self.beta_start} and {self.beta_end}"
            )


@dataclass(frozen=True)
class SampleGridRecipe:
    """Grids of images that the model draws during training.

    Args:
        every: optimiser steps between two grids, written to samples/ in the output directory; 0 draws none.
        classes: ids, one column each; default the first eight.
        rows: images per class.
        guidance: scale of classifier-free guidance; 1 is off.
        steps: denoising steps; "ddpm" needs at least 2.
        scheduler: "ddim", "dpm++" or "ddpm".
        seed: for the noise, the same in every grid.
    """

    every: int = 0
    classes: list[int] = field(default_factory=list)
    rows: int = 4
    guidance: float = 1.5
    steps: int = 50
    scheduler: Literal["ddim", "dpm++", "ddpm"] = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "guidance", "seed"):
            at_least(f"training.samples.{name}", getattr(self, name), 0)
        for name in ("rows", "steps"):
            at_least(f"training.samples.{name}", getattr(self, name), 1)
        if not math.isfinite(self.guidance):
            raise ValueError(f"training.samples.guidance must be a finite number, got {self.guidance}")
        if self.scheduler == "ddpm" and self.steps < 2:  # as in `moh.sampling.schedulers.SamplingSettings`
            raise ValueError(f"training.samples.steps must be at least 2 for ddpm, got {self.steps}")


@dataclass(frozen=True)
class DiffusionTrainingRecipe(ImageTrainingSettings):
    """How to train a diffusion model: `ImageTrainingSettings` with the paper's defaults, plus the following.

    Args:
        warmup_steps: the paper has none.
        lr_scheduler_type: constant in the paper.
        per_device_train_batch_size: 256 over all processes in the paper.
        logging_steps: steps between two log entries; the last step always has one.
        save_steps: steps between two checkpoints, a multiple of `logging_steps`.
        balance_loss_coef: weight beta of the load-balance loss.
        max_grad_norm: gradients are clipped to this norm; 0, as in the paper, does not clip.
        ema_warmup: at step s the decay of the average is at most (1 + s) / (10 + s).
        samples: image grids during training.
    """

    warmup_steps: float = 0
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 256
    logging_steps: int = 100
    save_steps: int = 10_000
    balance_loss_coef: float = 0.01
    max_grad_norm: float = 0.0
    ema_decay: float = 0.9999
    samples: SampleGridRecipe = field(default_factory=SampleGridRecipe)


@dataclass(frozen=True)
class DiffusionRecipe:
    """One training run of a class-conditional diffusion model.

    Args:
        model: the model to train.
        data: the images.
        training: how to train.
        diffusion: the process that the model learns to reverse.
        task: distinguishes recipes of diffusion models from others.
    """

    model: DiffusionModelRecipe
    data: DiffusionDataRecipe
    training: DiffusionTrainingRecipe
    diffusion: DiffusionProcessRecipe = field(default_factory=DiffusionProcessRecipe)
    task: Literal["diffusion"] = "diffusion"

    def __post_init__(self) -> None:
        steps = self.training.samples.steps
        if steps > self.diffusion.train_steps:
            raise ValueError(
                f"training.samples.steps must be at most diffusion.train_steps = {self.diffusion.train_steps}, got {steps}"
            )
