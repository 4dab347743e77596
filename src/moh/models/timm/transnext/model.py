"""`MoHTransNeXt`: the TransNeXt image backbone (arXiv 2311.17132) with Mixture-of-Head attention (arXiv 2410.11842).

A timm model: `timm.create_model("moh_transnext_base_75")`; the named sizes are in `presets.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from moh.models.timm.transnext.architecture import Architecture
from moh.models.timm.transnext.attention import AggregatedAttention, PlainAttention
from moh.models.timm.transnext.layers import Block, OverlapPatchEmbed, Stage
from moh.routing import Router, Scorer
from moh.routing.attached import attach_to_layers

POOLS = ("avg", "")


class MoHTransNeXt(nn.Module):
    """TransNeXt whose tokens choose their heads.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: "avg" for the mean over tokens, "" for none.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of output projections and in MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth, growing from 0 in the first block to this in the last.
        router_aux_loss_coef: weight of the load-balance loss, whose gradient joins that of any training loop's loss.
        backend: attention backend, None for the fastest that supports the call.
        architecture: the fields of `Architecture`.

    Raises:
        ValueError: a size is out of range or does not match another; names the argument.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        router_aux_loss_coef: float = 0.0,
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **architecture: Any,
    ) -> None:
        super().__init__()
        arch = Architecture(**architecture)
        if not 0 <= attn_drop_rate < 1:
            raise ValueError(f"attn_drop_rate must be at least 0 and below 1, got {attn_drop_rate}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.architecture = arch
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _checked_pool(global_pool)
        self.num_features = self.head_hidden_size = arch.embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(arch.embed_dims, arch.strides, strict=True))
        ]
        drop = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        last_block = max(sum(arch.depths) - 1, 1)
        rates = (drop_path_rate * block / last_block for block in range(sum(arch.depths)))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(arch.embed_dims):
            patch_embed = OverlapPatchEmbed(
                in_chans if i == 0 else arch.embed_dims[i - 1],
                dim,
                kernel_size=2 * arch.patch_size - 1 if i == 0 else 3,
                stride=arch.patch_size if i == 0 else 2,
                **factory,
            )
            blocks = [
                Block(
                    dim,
                    _attention(arch, i, backend=backend, **drop, **factory),
                    hidden=int(dim * arch.mlp_ratios[i]),
                    drop=proj_drop_rate,
                    drop_path=next(rates),
                    norm_eps=arch.norm_eps,
                    **factory,
                )
                for _ in range(arch.depths[i])
            ]
            self.stages.append(Stage(patch_embed, blocks, nn.LayerNorm(dim, eps=arch.norm_eps, **factory)))
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes, **factory)
        self.apply(_init_weights)
        attach_to_layers((m for m in self.modules() if isinstance(m, Router)), router_aux_loss_coef)

    def _classifier(self, num_classes: int, **factory: Any) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` -> normed features of the last stage `[B, C, H / stride, W / stride]`.

        Raises:
            ValueError: the image has a size that strides and pools don't divide, or not `in_chans` channels.
        """
        self._check(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features `[B, C, h, w]` -> logits `[B, num_classes]`, or with `pre_logits` what the classifier reads."""
        if self.global_pool:
            x = x.mean((2, 3))
        elif not isinstance(self.head, nn.Identity):
            x = x.movedim(1, -1)  # [B, h, w, C]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` -> logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of several stages, as in timm's models.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: the last n stages if a number, those of a list, None for all.
            norm: ignored, as every stage ends with its norm anyway.
            stop_early: skip the stages after the last requested one.
            output_fmt: "NCHW".
            intermediates_only: return only the list.

        Returns:
            features of the last stage that ran, and the list of `[B, C_i, H / stride_i, W / stride_i]`; or only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        self._check(x)
        taken, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one of `indices`, and the classifier."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.architecture.embed_dims[last]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; `global_pool` None keeps the pooling."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self.head = self._classifier(num_classes, device=parameter.device, dtype=parameter.dtype)
        self.head.apply(_init_weights).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and recompute the rest."""
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names that belong to the stem and to blocks, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stages\.0\.patch_embed",
            "blocks": [
                (r"^stages\.(\d+)\.patch_embed", None),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters for which a pull towards 0 makes no sense.

        As published: the temperature (0 is not neutral for it), the query embedding and position biases.
        `learnable_tokens` and `learnable_bias`, a linear map of the query, decay like other weights.
        """
        kinds = ("temperature", "query_embedding", "relative_pos_bias_local", "position_bias")
        return {name for name, _ in self.named_parameters() if any(kind in name.split(".") for kind in kinds)}

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape [B, in_chans = {self.in_chans}, H, W], got {tuple(x.shape)}")
        self.architecture.check_size((x.shape[2], x.shape[3]), name="x")


def _attention(arch: Architecture, stage: int, **options: Any) -> AggregatedAttention | PlainAttention:
    height, width = arch.trained_size
    stride, ratio = arch.strides[stage], arch.sr_ratios[stage]
    options |= {
        "num_heads": arch.num_heads[stage],
        "config": arch.layer_config(stage),
        "trained_size": (height // stride, width // stride),
        "qkv_bias": arch.qkv_bias,
    }
    if ratio == 1:
        return PlainAttention(arch.embed_dims[stage], **options)
    return AggregatedAttention(arch.embed_dims[stage], ratio=ratio, window_size=arch.window_size, **options)


def _checked_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")
    return global_pool


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | Scorer):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, AggregatedAttention | PlainAttention):
        module.init_weights()
