"""A pretrained dense diffusion transformer -> the same model with MoH attention, without calibration.

Takes diffusers' `DiTTransformer2DModel`, or a dense model of ours (`moh.models.published.load_published` makes one of the
published DiT), and only routers that need no fit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from torch import Tensor

from moh.config import ROUTERS
from moh.conversion.dense import check_weights, make_undecided
from moh.models.card import describe
from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.models.heads import heads_of_share, requested_share
from moh.models.hub import local_diffusion
from moh.routing import Router, router_class

UNFITTED = tuple(name for name in ROUTERS if not router_class(name).needs_fit)
"""Routers that need no calibration."""

OURS = MoHDiTTransformer2DModel.__name__

# diffusers' names -> ours, parts of names. Each of its blocks has a copy of the embeddings.
_EMBEDDING = re.compile(r"^transformer_blocks\.\d+\.norm1\.emb\.")
_PARTS = {
    "pos_embed.proj.": "x_embedder.",
    "timestep_embedder.": "time_embedder.",
    "class_embedder.embedding_table.": "class_embedder.",
    ".attn1.to_q.": ".attn.q_proj.",
    ".attn1.to_k.": ".attn.k_proj.",
    ".attn1.to_v.": ".attn.v_proj.",
    ".attn1.to_out.0.": ".attn.proj.",
    "proj_out_1.": "modulation_out.",
    "proj_out_2.": "proj_out.",
}


def convert_dit(
    model_or_path: DiTTransformer2DModel | MoHDiTTransformer2DModel | DiTPipeline | str | Path,
    *,
    share: float | None = None,
    shared_heads: int | Sequence[int | Sequence[int]] | None = None,
    active_heads: int | Sequence[int] | None = None,
    router: str = "two_stage",
    router_aux_loss_coef: float = 0.0,
) -> MoHDiTTransformer2DModel | DiTPipeline:
    """Turn a pretrained dense diffusion transformer into a MoH model with the same weights.

    Args:
        model_or_path: the dense model, a pipeline with one, or a directory or hub name of either. What is passed stays as
            it is: the weights are copied.
        share: share of all heads that each token uses, in (0, 1]; None means 0.75, unless `active_heads` is given. Up to half
            of the heads are shared then.
        shared_heads: instead of `share`: h_s, a number (the first heads) or one entry per layer: a number or that layer's
            shared heads.
        active_heads: instead of `share`: k, routed heads that each token activates; a number, or one per layer.
        router: "two_stage" or "single_stage" (learned; new weights that let every active head weigh 1 and choose the
            routed heads almost at random, to be trained) or "query_norm" (no parameters).
        router_aux_loss_coef: as in `MoHDiTTransformer2DModel`.

    Returns:
        the MoH model, in evaluation mode; for a pipeline object, one that has it and the same VAE and scheduler. With all
        heads active its outputs are the original's.

    Raises:
        ValueError: the model can't be converted, or an argument is out of range; nothing was changed.
    """
    share = requested_share(share, shared_heads=shared_heads, active_heads=active_heads)
    if share is None and shared_heads is None:
        raise ValueError(
            "shared_heads must be given with active_heads for a diffusion model: the default number was measured with fitted "
            "routers; or give a share of all heads"
        )
    if router not in UNFITTED:
        raise ValueError(
            f"router must be one of {', '.join(map(repr, UNFITTED))} for a diffusion model, got {router!r}"
        )
    pipeline = copy.copy(model_or_path) if isinstance(model_or_path, DiTPipeline) else None  # keeps its class names
    if isinstance(model_or_path, DiTPipeline):
        model = model_or_path.transformer
    else:
        model = load_dit(model_or_path) if isinstance(model_or_path, str | Path) else model_or_path
    check_weights(model)
    if isinstance(model, MoHDiTTransformer2DModel):
        fields, state = _of_ours(model), dict(model.state_dict())
    elif isinstance(model, DiTTransformer2DModel):
        fields, state = _of_diffusers(model), _state_of_diffusers(model)
    else:
        raise ValueError(f"model must be a DiTTransformer2DModel or a dense model of ours, got {type(model).__name__}")
    if share is not None:
        heads = fields["num_attention_heads"]
        shared_heads, active_heads = heads_of_share(share, heads, default_shared=max(1, heads // 2))
    routing = dict(shared_heads=_plain(shared_heads), active_heads=_plain(active_heads), router=router)
    routing |= dict(router_aux_loss_coef=router_aux_loss_coef)
    with torch.device("meta"):
        moh = MoHDiTTransformer2DModel(**fields | routing)
    moh = moh.to_empty(device=model.device)
    for tensor in (*moh.parameters(), *moh.buffers()):
        tensor.data = tensor.data.to(model.dtype)
    missing, unexpected = moh.load_state_dict(state, strict=False)
    if unexpected or any(".router." not in name for name in missing):
        raise ValueError(f"model has tensors that are not a DiT's: {', '.join(unexpected)}; without {missing}")
    for module in moh.modules():
        if isinstance(module, Router):
            make_undecided(module)
    if isinstance(model_or_path, str | Path):
        describe(moh, base=model_or_path)
    if pipeline is not None:
        pipeline.transformer = moh.eval()
        return pipeline
    return moh.eval()


def load_dit(path: str | Path) -> DiTTransformer2DModel | MoHDiTTransformer2DModel:
    """Load a diffusion transformer, dense or MoH, in float32 and evaluation mode.

    Args:
        path: a directory or hub name of a transformer, or of a pipeline, whose `transformer` it takes.

    Raises:
        ValueError: there is no such model, or it can't be read.
    """
    source = local_diffusion(path)
    where = {"subfolder": "transformer"} if (source / "transformer").is_dir() else {}
    try:
        config = MoHDiTTransformer2DModel.load_config(source, **where)
        kind = MoHDiTTransformer2DModel if config["_class_name"] == OURS else DiTTransformer2DModel
        return kind.from_pretrained(source, **where).eval()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"model {str(path)!r} can't be loaded: {' '.join(str(error).split())}") from None


def dit_without_weights(path: str | Path, *, revision: str | None = None) -> Any:
    """A dense diffusion transformer on the device "meta", made from its configuration alone.

    Args:
        path: as in `load_dit`.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is no such model, it can't be read, or `convert_dit` can't convert it.
    """
    local = Path(path).expanduser()
    source = local if local.is_dir() else path
    places = ({"subfolder": "transformer"}, {}) if not local.is_dir() or (local / "transformer").is_dir() else ({},)
    for place in places:
        try:
            config = MoHDiTTransformer2DModel.load_config(source, revision=revision, **place)
            kind: Any = MoHDiTTransformer2DModel if config["_class_name"] == OURS else DiTTransformer2DModel
            with torch.device("meta"):
                model = kind.from_config(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            continue
        (_of_ours if kind is MoHDiTTransformer2DModel else _of_diffusers)(model)
        return model
    raise ValueError(f"model {str(path)!r} can't be loaded: {reason}")


def _of_ours(model: MoHDiTTransformer2DModel) -> dict[str, Any]:
    """The configuration of a dense model of ours."""
    if model.config.shared_heads is not None:
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _of_diffusers(model: DiTTransformer2DModel) -> dict[str, Any]:
    """The configuration that describes the same dense model."""
    c = model.config
    for name, value in (
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("dropout", 0.0),
        ("norm_elementwise_affine", False),
    ):
        if c[name] != value:
            raise ValueError(f"model.config.{name} must be {value!r}, as in the published models, got {c[name]!r}")
    return dict(
        num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim,
        in_channels=c.in_channels,
        out_channels=model.out_channels,
        num_layers=c.num_layers,
        sample_size=c.sample_size,
        patch_size=c.patch_size,
        num_classes=c.num_embeds_ada_norm,
        norm_eps=c.norm_eps,
        freq_shift=1,
    )


def _state_of_diffusers(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """Its tensors by our names."""
    state: dict[str, Tensor] = {"pos_embed": model.pos_embed.pos_embed}
    for name, tensor in model.state_dict().items():
        ours = _EMBEDDING.sub("", name)
        for theirs, part in _PARTS.items():
            ours = ours.replace(theirs, part)
        if ours in state and not torch.equal(state[ours], tensor):
            raise ValueError(
                f"model's blocks must share one embedding of time steps and classes, but {name} differs from the first"
            )
        state.setdefault(ours, tensor)
    return state


def _plain(value: Any) -> Any:
    """Lists in place of other sequences, as a configuration file has them."""
    return [_plain(entry) for entry in value] if isinstance(value, Sequence) else value
