"""Classifier-free guidance of one denoising step: two passes of the model, joined.

diffusers' `DiTPipeline` joins the passes itself, over all noise channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def guided_output(
    transformer: nn.Module,
    x: Tensor,
    t: Tensor,
    classes: Tensor,
    *,
    guidance: float,
    null_class: int,
    guided_channels: int | None = None,
) -> Tensor:
    """The model's guided prediction for `x`: `uncond + guidance * (cond - uncond)` in the guided channels.

    All other channels are those of the conditional pass. With `guidance` 1 there is no second pass.

    Args:
        transformer: called as `transformer(x, timestep=t, class_labels=y).sample`.
        x: `[B, C, h, w]`, float32.
        t: the time step, a scalar or `[B]`.
        classes: `[B]` class ids.
        guidance: at least 0; 0 is unconditional, 1 conditional.
        null_class: the id of "no class".
        guided_channels: number of guided channels, from the first; None guides the noise, all C. The published
            samples of DiT and MoH-DiT guide the first 3 of 4.

    Returns:
        `[B, C or 2C, h, w]` float32.

    Raises:
        ValueError: `guidance` is below 0, or `guided_channels` is not from 1 to C.
    """
    if not guidance >= 0:
        raise ValueError(f"guidance must be at least 0, got {guidance}")
    channels = x.shape[1] if guided_channels is None else guided_channels
    if not 1 <= channels <= x.shape[1]:
        raise ValueError(f"guided_channels must be between 1 and {x.shape[1]}, got {guided_channels}")
    batch = len(x)
    t = t.to(x.device).expand(batch)
    if guidance != 1:
        x, t = torch.cat([x, x]), torch.cat([t, t])
        classes = torch.cat([classes, torch.full_like(classes, null_class)])
    dtype = next(transformer.parameters()).dtype
    output: Tensor = transformer(x.to(dtype), timestep=t, class_labels=classes).sample.float()
    if guidance == 1:
        return output
    conditional, unconditional = output.split(batch)
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], guidance)
    return torch.cat([guided, conditional[:, channels:]], dim=1)
