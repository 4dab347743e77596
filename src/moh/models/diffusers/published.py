"""The published MoH-DiT and DiT: their tensor names, with queries, keys and values in one matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh.models.published import NAMES, check_heads, check_tensors, cpu_tensors, require_keys, write_checkpoint
from moh.routing import Router

if TYPE_CHECKING:
    from moh.models.diffusers.dit import MoHDiTTransformer2DModel

KEYS = ("patch_size", "input_size", "depth", "hidden_size", "num_heads", "num_classes")
"""Fields that every configuration has; others are optional."""

_PIXELS_PER_LATENT = 8  # along each axis, of the published models' VAE

# Ours -> theirs, parts of names.
_PARTS = {
    "x_embedder.": "x_embedder.proj.",
    "time_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embedder.linear_2.": "t_embedder.mlp.2.",
    "class_embedder.": "y_embedder.embedding_table.",
    "transformer_blocks.": "blocks.",
    ".norm1.linear.": ".adaLN_modulation.1.",
    ".attn.router.shared.": ".attn.wg_1.",
    ".attn.router.routed.": ".attn.wg.",
    ".attn.router.stage.": ".attn.wg_0.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    "modulation_out.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
_QKV = re.compile(r"\.attn\.[qkv]_proj\.")


def named_config(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `load` needs for a model by its published name; image size and number of classes are those of the tensors.

    Raises:
        ValueError: the tensors that have these are missing.
    """
    from moh.models.diffusers.presets import architecture

    sizes = architecture(name.lower().replace("-", "_").replace("/", "_"))
    if missing := [key for key in ("pos_embed", "y_embedder.embedding_table.weight") if key not in state]:
        raise ValueError(f"the checkpoint of a {name} must have the tensors {', '.join(missing)}, which are missing")
    return {
        "patch_size": sizes["patch_size"],
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * sizes["patch_size"],
        "depth": sizes["num_layers"],
        "hidden_size": sizes["hidden_size"],
        "num_heads": sizes["num_attention_heads"],
        "head_dim": sizes["attention_head_dim"],
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,  # one row is "no class"
        "shared_head": sizes["shared_heads"],
        "routed_head": sizes["active_heads"],
    }


def training_sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a training's arguments change in `named_config`: nothing, as all sizes are in the tensors."""
    return {}


def load(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A `moh.models.diffusers.MoHDiTTransformer2DModel` of the published sizes with the published weights.

    Args:
        config: `patch_size`, `input_size`, `depth`, `hidden_size`, `num_heads` (a number or one per layer) and
            `num_classes`; `shared_head` (h_s) and `routed_head` (k), or neither for a dense DiT. May have `head_dim`
            (default: `hidden_size / num_heads`), `in_channels` (4), `learn_sigma` (True) and `norm_eps` (1e-6).
    """
    from moh.models.diffusers import MoHDiTTransformer2DModel

    require_keys(config, KEYS)
    in_channels = config.get("in_channels", 4)
    if config.get("norm_eps", 1e-6) != 1e-6:
        raise ValueError(f"config['norm_eps'] must be 1e-6, got {config['norm_eps']}")
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(
            num_attention_heads=config["num_heads"],
            attention_head_dim=_head_dim(config),
            hidden_size=config["hidden_size"],
            in_channels=in_channels,
            out_channels=in_channels * (2 if config.get("learn_sigma", True) else 1),
            num_layers=config["depth"],
            sample_size=config["input_size"],
            patch_size=config["patch_size"],
            num_classes=config["num_classes"],
            shared_heads=config.get("shared_head"),
            active_heads=config.get("routed_head"),
        )
    check_tensors(state, {name: tensor.shape for name, tensor in published_state(model).items()})
    dtype = dtype if dtype is not None else state["x_embedder.proj.weight"].dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in _split(state, model).items()}, assign=True)
    return model.eval()  # type: ignore[no-any-return]


def save(model: MoHDiTTransformer2DModel, file: Path) -> None:
    """Write a PyTorch file of the published layout; see `moh.models.published.save_published`."""
    config = published_config(model)
    state = cpu_tensors(published_state(model))
    name = name_of(config, state)
    stated = {} if name is None else {"model": name, "image_size": config["input_size"] * _PIXELS_PER_LATENT}
    write_checkpoint(file, {"ema": state, "args": config | stated})


def published_config(model: MoHDiTTransformer2DModel) -> dict[str, Any]:
    """The configuration that `load` takes for a model as it is now, without its family.

    Raises:
        ValueError: the published code can't express it.
    """
    c = model.config
    for field, published in (("norm_eps", 1e-6), ("freq_shift", 0)):
        if c[field] != published:
            raise ValueError(f"model can't be saved as published: {field} must be {published}, got {c[field]}")
    layers = [
        module.config for module in model.modules() if isinstance(module, Router)
    ]  # the dial may have changed them
    check_heads(layers, routers=("two_stage",))
    for number, layer in enumerate(layers):
        if layer.num_shared == 1:  # the published layer has no W_s then, and reads it all the same
            raise ValueError(f"model can't be saved as published: layer {number} must not have just one shared head")
    heads = c.num_attention_heads
    if not isinstance(heads, int):
        heads = list(heads)
    elif heads * c.attention_head_dim != c.hidden_size:
        heads = [heads] * c.num_layers  # the published code reads head_dim only next to a list
    return {
        "patch_size": c.patch_size,
        "input_size": c.sample_size,
        "depth": c.num_layers,
        "hidden_size": c.hidden_size,
        "num_heads": heads,
        "head_dim": c.attention_head_dim,
        "num_classes": c.num_classes,
        "in_channels": c.in_channels,
        "learn_sigma": c.out_channels == 2 * c.in_channels,
    } | (
        {"shared_head": [layer.num_shared for layer in layers], "routed_head": [layer.active_heads for layer in layers]}
        if layers
        else {}
    )


def name_of(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str | None:
    """The published model that has these sizes, whatever its images' size and number of classes; None if there is none."""
    for name in (name for name, family in NAMES.items() if family == "dit"):
        known = named_config(name, state) | {"in_channels": 4, "learn_sigma": True}
        if all(key in config and _listed(config, key) == _listed(known, key) for key in known):
            return name
    return None


def _listed(config: Mapping[str, Any], key: str) -> Any:
    """A value, as one per layer where it may be."""
    value = config[key]
    return [value] * config["depth"] if key == "num_heads" and isinstance(value, int) else value


def published_names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> those of the published checkpoints; queries, keys and values of a layer share one."""
    return {name: _published(name) for name in model.state_dict()}


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a `MoHDiTTransformer2DModel` as a published checkpoint has them."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():  # q_proj, k_proj and v_proj come in this order
        parts.setdefault(_published(name), []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def _split(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published tensors by our names."""
    ours = {}
    for name, published in published_names(model).items():
        tensor = state[published]
        if match := _QKV.search(name):
            tensor = tensor.chunk(3)["qkv".index(match[0][len(".attn.")])].clone()
        ours[name] = tensor
    return ours


def _published(name: str) -> str:
    name = _QKV.sub(".attn.qkv.", name)
    for ours, theirs in _PARTS.items():
        name = name.replace(ours, theirs)
    return name


def _head_dim(config: Mapping[str, Any]) -> int:
    if "head_dim" in config:
        return int(config["head_dim"])
    heads = config["num_heads"]
    if not isinstance(heads, int):
        raise ValueError("config must have the key head_dim where num_heads is a list")
    if config["hidden_size"] % heads:
        raise ValueError(
            f"config['hidden_size'] must be a multiple of num_heads = {heads}, got {config['hidden_size']}"
        )
    return int(config["hidden_size"] // heads)
