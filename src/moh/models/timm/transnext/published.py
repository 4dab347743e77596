"""The published MoH-ViT: TransNeXt's tensor names, and the two-stage router's three matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.models.published import NAMES, check_heads, check_tensors, cpu_tensors, require_keys, write_checkpoint

if TYPE_CHECKING:
    from moh.models.timm.transnext.model import MoHTransNeXt

_SAME_NAME = ("img_size", "num_classes", "embed_dims", "num_heads", "depths", "sr_ratios", "mlp_ratios")
KEYS = (*_SAME_NAME, "shared_head", "routed_head")
"""Fields that every configuration has; others are optional."""

_OPTIONAL = ("patch_size", "window_size", "qkv_bias", "norm_eps", "in_chans")

# Our stages are modules numbered from 0, theirs are numbers in names, from 1.
_STAGE = re.compile(r"^stages\.(\d+)\.(patch_embed|blocks|norm)\.")
_STAGE_NAMES = {"patch_embed": "patch_embed{}.", "blocks": "block{}.", "norm": "norm{}."}
_PARTS = {
    ".attn.router.shared.": ".attn.wg_1.",
    ".attn.router.routed.": ".attn.wg.",
    ".attn.router.stage.": ".attn.wg_0.",
    ".attn.position_bias.fc1.": ".attn.cpb_fc1.",
    ".attn.position_bias.fc2.": ".attn.cpb_fc2.",
    ".mlp.dwconv.": ".mlp.dwconv.dwconv.",
}


def named_config(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `load` needs for a published model; the number of classes is that of the tensors, images are 224 x 224."""
    from moh.models.timm.transnext.presets import architecture

    sizes = architecture(name)
    heads = {"shared_head": sizes.pop("shared_heads"), "routed_head": sizes.pop("active_heads")}
    classes = len(state["head.weight"]) if "head.weight" in state else 1000
    return {"img_size": 224, "num_classes": classes, **sizes, **heads}


def training_sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a training's arguments change in `named_config`: positions are relative to the images of the first training."""
    size = arguments.get("pretrain_size") or arguments.get("input_size")
    return {} if size is None else {"img_size": size}


def load(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A `moh.models.timm.transnext.MoHTransNeXt` of the published sizes with the published weights.

    Args:
        config: `img_size`, `num_classes`, and for each stage `embed_dims`, `num_heads`, `depths`, `sr_ratios`,
            `mlp_ratios`, `shared_head` (h_s) and `routed_head` (k). May have `patch_size`, `window_size`, `qkv_bias`,
            `norm_eps` and `in_chans`.
    """
    from moh.models.timm.transnext import MoHTransNeXt

    require_keys(config, KEYS)
    options = {key: config[key] for key in (*_SAME_NAME, *_OPTIONAL) if key in config}
    with torch.device("meta"):
        model = MoHTransNeXt(shared_heads=config["shared_head"], active_heads=config["routed_head"], **options)
    names = published_names(model)
    expected = {names[name]: tensor.shape for name, tensor in model.state_dict().items()}
    check_tensors(state, expected)
    dtype = dtype if dtype is not None else state["patch_embed1.proj.weight"].dtype
    model = model.to_empty(device="cpu")
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return model.to(dtype).eval()


def save(model: MoHTransNeXt, file: Path) -> None:
    """Write a PyTorch file of the published layout; see `moh.models.published.save_published`."""
    config = published_config(model)
    names = published_names(model)
    state = cpu_tensors({names[ours]: tensor for ours, tensor in model.state_dict().items()})
    name = name_of(config)
    stated = (
        {} if name is None else {"model": name, "input_size": config["img_size"], "nb_classes": config["num_classes"]}
    )
    write_checkpoint(file, {"model": state, "args": config | stated})


def published_config(model: MoHTransNeXt) -> dict[str, Any]:
    """The configuration that `load` takes for a model as it is now, without its family.

    Raises:
        ValueError: the published code can't express it.
    """
    if model.architecture.shared_heads is None:
        raise ValueError("model can't be saved as published: it is dense, and the published TransNeXt is MoH")
    if model.global_pool != "avg":
        raise ValueError(f"model can't be saved as published: global_pool must be 'avg', got {model.global_pool!r}")
    modules: Any = model.stages
    # The routers have the present numbers of heads: the dial may have changed those of the architecture
    layers = [[block.attn.router.config for block in stage.blocks] for stage in modules]
    check_heads([layer for stage in layers for layer in stage], routers=("two_stage",))
    for number, stage in enumerate(layers):
        if len(numbers := {layer.active_heads for layer in stage}) > 1:
            raise ValueError(
                f"model can't be saved as published: all layers of stage {number} must have the same active_heads, got "
                f"{sorted(numbers)}"
            )
    stages: list[MoHConfig] = [stage[0] for stage in layers]
    sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(model.architecture).items()}
    del sizes["shared_heads"], sizes["active_heads"]
    classes = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    heads = {"shared_head": [s.num_shared for s in stages], "routed_head": [s.active_heads for s in stages]}
    return {**sizes, **classes, **heads}


def name_of(config: Mapping[str, Any]) -> str | None:
    """The published model that has these sizes, whatever its images' size and number of classes; None if there is none."""
    from moh.models.timm.transnext.architecture import Architecture
    from moh.models.timm.transnext.presets import architecture

    for name in (name for name, family in NAMES.items() if family == "transnext"):
        known = asdict(Architecture(**architecture(name)))
        known |= {"shared_head": known.pop("shared_heads"), "routed_head": known.pop("active_heads"), "in_chans": 3}
        del known["img_size"]
        if all(config[key] == (list(value) if isinstance(value, tuple) else value) for key, value in known.items()):
            return name
    return None


def timm_model(model: MoHTransNeXt) -> tuple[nn.Module, dict[str, Any]]:
    """A loaded checkpoint as a model of `timm.create_model`, and the arguments of that call, which are saved with it.

    Models of other sizes than the published ones get a published one's name and all of their sizes as arguments.
    """
    import timm

    from moh.models.timm.loading import image_input

    config = published_config(model)
    name = name_of(config)
    arguments = {
        key: value for key, value in config.items() if key not in ("shared_head", "routed_head", "num_classes")
    }
    arguments |= {"shared_heads": config["shared_head"], "active_heads": config["routed_head"]}
    if name is not None:
        arguments = {key: arguments[key] for key in ("img_size",)} if config["img_size"] != 224 else {}
    made: Any = timm.create_model(name or "moh_transnext_base_75", num_classes=model.num_classes, **arguments)
    made.load_state_dict(model.state_dict())
    size = (model.in_chans, *model.architecture.trained_size)
    made.pretrained_cfg = {**made.pretrained_cfg, "input_size": size, "num_classes": model.num_classes}
    read = image_input(made)  # a mean and deviation for each of its channels
    made.pretrained_cfg |= {"mean": read.mean, "std": read.std}
    return made.to(next(model.parameters()).dtype).eval(), arguments


def published_names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> those of the published checkpoints, for a `MoHTransNeXt`."""
    return {name: _published(name) for name in model.state_dict()}


def own_names(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What timm loads into a `MoHTransNeXt`: a published checkpoint with our names for its tensors; any other as it is.

    Args:
        checkpoint: a state dict, or a training checkpoint that holds one as "ema" or "model".
        model: what it is for; it may have another classifier or number of channels.
    """
    state = checkpoint.get("ema", checkpoint.get("model", checkpoint))
    if "patch_embed1.proj.weight" not in state:
        return dict(state)
    ours = {theirs: name for name, theirs in published_names(model).items()}
    return {ours.get(name, name): tensor for name, tensor in state.items()}


def _published(name: str) -> str:
    name = _STAGE.sub(lambda match: _STAGE_NAMES[match[2]].format(int(match[1]) + 1), name)
    for ours, theirs in _PARTS.items():
        name = name.replace(ours, theirs)
    return name
