"""The transformers Trainer for diffusion models: noise, hybrid loss, balance loss, averaged weights, sample grids.

An image's random numbers in a step depend only on the run's seed, the step and the image's index: a resumed run draws the
same ones as an uninterrupted run, and several processes the same ones as one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from moh.data.seeds import generator_of
from moh.sampling import ImageModel, image_grid, sample, save_image_model, write_png
from moh.sampling.schedulers import SamplingSettings
from moh.training.average import Averaging, MovingAverage
from moh.training.diffusion.data import to_float
from moh.training.diffusion.loss import add_noise, hybrid_loss
from moh.training.diffusion.recipe import DiffusionTrainingRecipe
from moh.training.routing_trainer import RoutingTrainer


class Denoiser(nn.Module):
    """A diffusers model for the Trainer: called with tensors alone, its `config` hidden, because it is not transformers'.

    The model stays in evaluation mode, so that it drops no labels: the trainer does, with its own random numbers.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def train(self, mode: bool = True) -> Denoiser:
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """`[B, 2C, h, w]` from `[B, C, h, w]`, `[B]` and `[B]`."""
        output: Tensor = self.transformer(x, timestep=t, class_labels=classes).sample
        return output


class DiffusionTrainer(RoutingTrainer):
    """`transformers.Trainer` for class-conditional diffusion models, MoH or dense.

    The loss is the mean over images of the hybrid loss, plus the balance-loss coefficient times the mean of the
    layers' balance losses. In addition to `RoutingTrainer`'s entries the log has `mse` and `vb`, the parts of the hybrid
    loss. A checkpoint also holds the model with the averaged weights, for `moh sample`.

    Args:
        args: all arguments of `transformers.Trainer`; `model` is a `Denoiser`, and the data sets return whole batches.
        image_model: the model with its scheduler, VAE and class names; its transformer is trained. `averaged_model` is the
            same with the averaged weights.
        settings: the recipe's balance loss, averaged weights and sample grids.
        flip: mirror half of the images.
        kwargs: all arguments of `transformers.Trainer`.
    """

    can_be_sharded = False

    def __init__(
        self,
        *args: Any,
        image_model: ImageModel,
        settings: DiffusionTrainingRecipe,
        flip: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the Trainer divides by the accumulation steps
        self.image_model = image_model
        self.settings = settings
        self.flip = flip
        self.scheduler = image_model.scheduler
        ramp = (lambda steps: (1 + steps) / (10 + steps)) if settings.ema_warmup else None  # as diffusers' EMAModel
        self.average = MovingAverage(image_model.transformer, settings.ema_decay, ramp=ramp)
        self.averaged_model = dataclasses.replace(image_model, transformer=self.average.module)
        self.add_callback(Averaging(self.average))
        self.add_callback(_Grids(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of a batch of `PixelDataset` or `LatentDataset`."""
        drawn = self._draw(inputs["indices"])
        clean = _clean(inputs, drawn)  # [B, C, h, w]
        noisy = add_noise(clean, drawn.noise, drawn.t, self.scheduler)
        dropped = drawn.uniform < self.image_model.transformer.config["class_dropout_prob"]
        classes = torch.where(dropped, self.image_model.num_classes, inputs["labels"])
        with self.recording(model, always=self.settings.balance_loss_coef > 0) as routing:
            output = model(noisy, drawn.t, classes)  # [B, 2C, h, w]
        terms = hybrid_loss(output, clean, noisy, drawn.noise, drawn.t, self.scheduler)
        loss = terms.loss.mean()
        if self.logs_step(model):
            self._routing_log |= {"mse": float(terms.mse.mean().detach()), "vb": float(terms.vb.mean().detach())}
        if routing is not None and len(routing) and self.settings.balance_loss_coef:
            loss = loss + self.settings.balance_loss_coef * routing.balance_loss()
        return (loss, {"output": output}) if return_outputs else loss

    def _draw(self, indices: Tensor) -> Draws:
        return draw(
            indices,
            self.image_model.sample_shape,
            seed=self.args.seed,
            step=self.state.global_step,
            train_steps=self.scheduler.config.num_train_timesteps,
            mirror=self.flip,
            latents=self.image_model.vae is not None,
            device=self.args.device,
        )

    def load_average(self, checkpoint: Path) -> None:
        """Load the averaged weights of a checkpoint.

        Raises:
            ValueError: the weights can't be read.
        """
        kind = type(self.image_model.transformer)
        try:
            saved = kind.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"the averaged weights of {checkpoint} can't be read: {error}") from None
        self.average.module.load_state_dict(saved.state_dict())

    def draw_grid(self) -> None:
        """Draw this step's grid with the averaged weights: a PNG in samples/, and an image in TensorBoard."""
        grid = self.settings.samples
        classes = grid.classes or list(range(min(8, self.image_model.num_classes)))
        settings = SamplingSettings(scheduler=grid.scheduler, steps=grid.steps, guidance=grid.guidance, seed=grid.seed)
        picture = image_grid(sample(self.averaged_model, classes * grid.rows, settings), columns=len(classes))
        step = self.state.global_step
        folder = Path(self.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"step-{step:07d}.png", picture)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", picture, step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what the Trainer resumes from, and the averaged model next to it."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_image_model(self.averaged_model, Path(output_dir or self.args.output_dir), with_vae=False)


class _Grids(TrainerCallback):  # type: ignore[misc]
    """Draws the grids that are due."""

    def __init__(self, trainer: DiffusionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.trainer.settings.samples.every
        if every and state.global_step % every == 0 and state.is_world_process_zero:
            self.trainer.draw_grid()


def _clean(inputs: dict[str, Tensor], drawn: Draws) -> Tensor:
    """`[B, C, h, w]` float32: images in -1..1 or latents, mirrored as drawn."""
    if "pixels" in inputs:
        x = to_float(inputs["pixels"])
        return torch.where(drawn.mirrored[:, None, None, None], x.flip(-1), x)
    rows = torch.arange(len(drawn.t), device=drawn.t.device)
    mean, std = (inputs[name][rows, drawn.mirrored.long()].float() for name in ("mean", "std"))
    assert drawn.latent is not None
    return mean + std * drawn.latent


@dataclass(frozen=True)
class Draws:
    """The random numbers of B images.

    Attributes:
        t: `[B]` int64, the time steps.
        noise: `[B, C, h, w]` float32, added to the images.
        mirrored: `[B]` bool.
        uniform: `[B]` float32 in 0..1, to drop labels.
        latent: `[B, C, h, w]` float32, to draw latents with; None for pixels.
    """

    t: Tensor
    noise: Tensor
    mirrored: Tensor
    uniform: Tensor
    latent: Tensor | None


def draw(
    indices: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int,
    step: int,
    train_steps: int,
    mirror: bool,
    latents: bool,
    device: torch.device,
) -> Draws:
    """Draw the random numbers of one step.

    Args:
        indices: `[B]`, the images' indices in the data set.
        shape: (C, h, w).
        seed: the run's.
        step: the optimiser step.
        train_steps: number of diffusion steps.
        mirror: mirror half of the images; False mirrors none.
        latents: also draw noise for latents.
        device: where the tensors go.
    """
    count = len(indices)
    noise = torch.empty(count, 2 if latents else 1, *shape)
    uniform = torch.empty(count, 2)
    t = torch.empty(count, dtype=torch.int64)
    for row, index in enumerate(indices.tolist()):
        generator = generator_of(seed, step, index)  # on the CPU: the same numbers on every device
        t[row].random_(train_steps, generator=generator)
        uniform[row].uniform_(generator=generator)
        noise[row].normal_(generator=generator)
    noise, uniform, t = (value.to(device, non_blocking=True) for value in (noise, uniform, t))
    return Draws(t, noise[:, 0], (uniform[:, 0] < 0.5) & mirror, uniform[:, 1], noise[:, 1] if latents else None)
