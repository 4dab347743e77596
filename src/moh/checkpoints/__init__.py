"""Load checkpoints that the authors of the paper published, into our models, exactly.

One module per family; our own checkpoints need only `from_pretrained` or timm's loaders.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh.models.reading import read_tensors
from moh.models.transformers.published import read_published_config

_FAMILIES = {
    "moh_llama": "moh.models.transformers.published",
    "transnext": "moh.checkpoints.transnext",
    "dit": "moh.checkpoints.dit",
}
"""config["model"] -> the module that knows it."""


def load_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build our model from a published checkpoint.

    Args:
        path_or_state_dict: tensors by their published names; or a `.safetensors` file; or a directory with one, or
            with the shards that `model.safetensors.index.json` lists; or a PyTorch file, read with `weights_only=True`.
        config: the published keys: `model`, which names the family, and those of its `load`: "moh_llama"
            (`moh.models.transformers.published`), "transnext" (`moh.checkpoints.transnext`) or "dit" (`moh.checkpoints.dit`).
            None reads the config.json of a directory that is laid out like the published MoH-LLaMA3-8B.
        dtype: of the model; None keeps the checkpoint's.

    Returns:
        the model in evaluation mode.

    Raises:
        ValueError: the model is unknown, there is no configuration, a key or a file is missing, or tensors are missing,
            unexpected or of the wrong shape; names them.
    """
    if config is None:
        if isinstance(path_or_state_dict, Mapping):
            raise ValueError("config must be given with a state dict: only a directory has its own")
        config = read_published_config(path_or_state_dict)
    if "model" not in config:
        raise ValueError("config must have the key 'model'")
    if config["model"] not in _FAMILIES:
        raise ValueError(f"config['model'] must be one of {', '.join(map(repr, _FAMILIES))}, got {config['model']!r}")
    family = importlib.import_module(_FAMILIES[config["model"]])
    model: nn.Module = family.load(read_tensors(path_or_state_dict), config, dtype)
    return model
