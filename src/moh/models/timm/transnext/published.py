"""The published MoH-ViT: TransNeXt's tensor names, and the two-stage router's three matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moh.models.published import check_tensors, require_keys

_SAME_NAME = ("img_size", "num_classes", "embed_dims", "num_heads", "depths", "sr_ratios", "mlp_ratios")
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


def load(state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A `moh.models.timm.transnext.MoHTransNeXt` of the published sizes with the published weights.

    Args:
        config: `img_size`, `num_classes`, and for each stage `embed_dims`, `num_heads`, `depths`, `sr_ratios`,
            `mlp_ratios`, `shared_head` (h_s) and `routed_head` (k). May have `patch_size`, `window_size`, `qkv_bias`,
            `norm_eps` and `in_chans`.
    """
    from moh.models.timm.transnext import MoHTransNeXt

    require_keys(config, (*_SAME_NAME, "shared_head", "routed_head"))
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
