"""The samplers and their settings: diffusers' schedulers, set up for models that learn variances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    # The published evaluation: ancestral steps with the learned variance, evenly spaced over all training steps
    "ddpm": (DDPMScheduler, {"variance_type": "learned_range", "timestep_spacing": "linspace"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    # Steps even in the logarithm of signal to noise: ten are as good as a hundred that are even in time
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_lu_lambdas": True}),
}
"""name -> (diffusers' scheduler, its settings). "ddim" and "dpm++" don't use the learned variance."""

_DIFFUSION = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "clip_sample")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn.

    Args:
        scheduler: "ddim", "dpm++" (both deterministic after the first noise) or "ddpm" (new noise in every step).
        steps: denoising steps, from 1 (2 for "ddpm") to those of training.
        guidance: scale of classifier-free guidance, at least 0; 1 is off and costs one forward pass per step, not two.
        seed: image i of a seed is the same whatever the batch size and the number of processes.
        guided_channels: number of guided channels, from the first; None guides all. The published samples guide 3 of
            their latents' 4.
    """

    scheduler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SAMPLERS:
            raise ValueError(f"scheduler must be one of {', '.join(SAMPLERS)}, got {self.scheduler!r}")
        least = 2 if self.scheduler == "ddpm" else 1  # the first of its steps is the noisiest, the last t = 0
        if self.steps < least:
            raise ValueError(f"steps must be at least {least} for {self.scheduler}, got {self.steps}")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be a number of at least 0 (1 is off), got {self.guidance}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(f"guided_channels must be at least 1, got {self.guided_channels}")


def diffusion_scheduler(
    *,
    clip: bool,
    train_steps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> DDIMScheduler:
    """The scheduler to save with a model: it describes the diffusion that the model was trained on.

    A DDIM scheduler, because diffusers' `DiTPipeline` drops the learned variance, which DDPM would need.

    Args:
        clip: clip predicted images to -1..1 in each step: right for pixels, wrong for latents.
        train_steps: steps of the diffusion.
        beta_schedule, beta_start, beta_end: as in diffusers; the defaults are the paper's.
    """
    return DDIMScheduler(
        num_train_timesteps=train_steps,
        beta_schedule=beta_schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        clip_sample=clip,
        **SAMPLERS["ddim"][1],
    )


def read_scheduler(folder: Path, *, clip: bool | None = None) -> DDIMScheduler:
    """The diffusion that a saved scheduler of any kind describes, as from `diffusion_scheduler`.

    Args:
        folder: where it is saved.
        clip: as for `diffusion_scheduler`; None takes it from the file.

    Raises:
        ValueError: it can't be read, or its model does not predict the noise.
    """
    try:
        config = DDIMScheduler.load_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"scheduler {folder} can't be read: {' '.join(str(error).split())}") from None
    predicted = config.get("prediction_type", "epsilon")
    if predicted != "epsilon":
        raise ValueError(f"scheduler {folder} must have prediction_type 'epsilon', got {predicted!r}")
    about = {name: config[name] for name in _DIFFUSION if name in config}
    if clip is not None:
        about["clip_sample"] = clip
    return DDIMScheduler(**about, **SAMPLERS["ddim"][1])


def make_scheduler(
    settings: SamplingSettings, diffusion: Mapping[str, Any], *, learned_variance: bool = True
) -> SchedulerMixin:
    """The scheduler of `settings`, with its time steps set.

    Args:
        settings: the sampler and its steps.
        diffusion: configuration of the scheduler saved with the model; only the diffusion itself is read
            (`num_train_timesteps`, the betas, `clip_sample`).
        learned_variance: whether the model predicts the variance; if not, "ddpm" takes its lower bound.

    Raises:
        ValueError: `settings` has more steps than the diffusion.
    """
    kind, own = SAMPLERS[settings.scheduler]
    about = {name: diffusion[name] for name in _DIFFUSION if name in diffusion}
    if settings.steps > about["num_train_timesteps"]:
        raise ValueError(
            f"steps must be at most those of the diffusion, {about['num_train_timesteps']}, got {settings.steps}"
        )
    if kind is DPMSolverMultistepScheduler:
        about.pop("clip_sample", None)  # it has no such setting
    if kind is DDPMScheduler and not learned_variance:
        own = own | {"variance_type": "fixed_small"}
    scheduler = kind(**about, **own)
    scheduler.set_timesteps(settings.steps)
    return scheduler


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler reads the channels of the learned variance."""
    return getattr(scheduler.config, "variance_type", None) == "learned_range"
