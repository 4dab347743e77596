"""`MoHDiTTransformer2DModel`: the diffusion transformer (arXiv 2212.09748) with Mixture-of-Head attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from moh.attention.call import transforms_are_active
from moh.config import MoHConfig
from moh.layer import MoHAttention
from moh.models.card import PushedWithCard
from moh.models.dial import HasActiveHeads
from moh.models.heads import layer_configs
from moh.routing import Router, Scorer
from moh.routing.attached import attach_to_layers

MODULATION_EPS = 1e-6
"""Epsilon of the norms inside diffusers' adaptive norms, of the published models, and of the last norm."""


class DenseAttention(nn.Module):
    """Multi-head self-attention over `[B, N, C]`; tensors are named as in `moh.MoHAttention`."""

    def __init__(self, dim: int, num_heads: int, *, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim)
        self.k_proj = nn.Linear(dim, num_heads * head_dim)
        self.v_proj = nn.Linear(dim, num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (p(x).unflatten(-1, heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        z = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, D]
        out: Tensor = self.proj(z.transpose(1, 2).flatten(2))
        return out


class MoHDiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning.

    Args:
        dim: C.
        heads: heads and routing, or the number of heads of dense attention.
        head_dim: D.
        norm_eps: epsilon of the norm before the MLP.
        backend: attention backend of MoH, None for the fastest.
    """

    def __init__(
        self, dim: int, heads: MoHConfig | int, *, head_dim: int, norm_eps: float, backend: str | None
    ) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn: DenseAttention | MoHAttention
        if isinstance(heads, int):
            self.attn = DenseAttention(dim, heads, head_dim=head_dim)
        else:
            self.attn = MoHAttention(
                dim,
                heads.num_heads,
                shared_heads=heads.shared_heads,
                active_heads=heads.active_heads,
                router=heads.router,
                head_dim=head_dim,
                qkv_bias=True,
                backend=backend,
            )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def init_weights(self) -> None:
        """Start as the identity: nothing is added until the modulation is trained."""
        q, k, v = (p.weight for p in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj))
        # The published models draw the three as one matrix, whose larger fan-out makes them smaller.
        bound = math.sqrt(6 / (q.shape[1] + q.shape[0] + k.shape[0] + v.shape[0]))
        for weight in (q, k, v):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.norm1.linear.weight)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x `[B, N, C]`, conditioning `[B, C]` -> `[B, N, C]`."""
        normed, gate_attn, shift, scale, gate_ff = self.norm1(x, emb=conditioning)  # [B, N, C], then [B, C] each
        x = x + gate_attn[:, None] * self.attn(normed)
        x = x + gate_ff[:, None] * self.ff(modulate(self.norm2(x), shift, scale))
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x `[B, N, C]`, shifted and scaled per image; shift and scale `[B, C]`."""
    return x * (1 + scale[:, None]) + shift[:, None]


TIME_CHANNELS = 256
"""Sines and cosines that first encode a time step."""


class MoHDiTTransformer2DModel(PushedWithCard, HasActiveHeads, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Class-conditional diffusion transformer in which each token chooses its heads.

    It predicts the noise and, in further channels, the variance. A model with neither `shared_heads` nor `active_heads`
    is dense, without any router. `moh.record_routing` reads the routing and the load-balance loss.

    Args:
        num_attention_heads: h, one number or one per layer.
        attention_head_dim: D, the width of one head; `h * D` may differ from `hidden_size`.
        hidden_size: C; None means `num_attention_heads * attention_head_dim`, if all layers have the same number.
        in_channels: channels of the latents or images.
        out_channels: None means `2 * in_channels` (noise and variance); `in_channels` predicts the noise alone.
        num_layers: blocks.
        sample_size: height and width of the latents or images.
        patch_size: height and width of the patch that makes one token.
        num_classes: classes; the id `num_classes` stands for "no class" (guidance, label dropout).
        shared_heads: h_s: a number (every layer shares its first heads) or a list with one entry per layer: a number
            or that layer's shared heads; None together with `active_heads` makes a dense model.
        active_heads: k, routed heads active per token, a number or one per layer.
        router: one of `moh.config.ROUTERS`, as in `moh.MoHConfig`.
        class_dropout_prob: in training, share of labels that are replaced by "no class".
        norm_eps: epsilon of the norm before each MLP; that of all others is 1e-6, as in diffusers' DiT.
        freq_shift: shift in the time step's frequencies `10000 ** (-i / (128 - freq_shift))`: 0 in the published models, 1 in
            diffusers' `DiTTransformer2DModel`.
        moh_backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).
        router_aux_loss_coef: weight of the load-balance loss, whose gradient joins that of any training loop's loss.

    Raises:
        ValueError: a size is out of range or does not match another; names the argument.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MoHDiTBlock"]  # noqa: RUF012
    _repeated_blocks = ["MoHDiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "router"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int | Sequence[int] = 16,
        attention_head_dim: int = 72,
        hidden_size: int | None = None,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        shared_heads: int | Sequence[int | Sequence[int]] | None = None,
        active_heads: int | Sequence[int] | None = None,
        router: str = "two_stage",
        class_dropout_prob: float = 0.1,
        norm_eps: float = 1e-6,
        freq_shift: int = 0,
        moh_backend: str | None = None,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if (shared_heads is None) != (active_heads is None):
            raise ValueError("shared_heads and active_heads must both be given, or neither for a dense model")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        dense = active_heads is None
        layers = layer_configs(
            num_layers,
            num_attention_heads,
            shared_heads=shared_heads,
            active_heads=0 if active_heads is None else active_heads,
            router=router,
        )
        if hidden_size is None:
            if not isinstance(num_attention_heads, int):
                raise ValueError("hidden_size must be given when num_attention_heads is a list")
            hidden_size = num_attention_heads * attention_head_dim
        out_channels = 2 * in_channels if out_channels is None else out_channels
        _check_sizes(attention_head_dim, hidden_size, in_channels, out_channels, sample_size, patch_size, num_classes)
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must be at least 0 and below 1, got {class_dropout_prob}")
        self.register_to_config(hidden_size=hidden_size, out_channels=out_channels)  # pipelines read out_channels
        self.gradient_checkpointing = False

        grid = sample_size // patch_size
        positions = get_2d_sincos_pos_embed(hidden_size, grid, base_size=grid, output_type="pt").float()
        self.register_buffer("pos_embed", positions[None])  # [1, N, C]; saved, as in the published checkpoints
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)
        self.time_embedder = TimestepEmbedding(TIME_CHANNELS, hidden_size)
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            MoHDiTBlock(
                hidden_size,
                heads.num_heads if dense else heads,
                head_dim=attention_head_dim,
                norm_eps=norm_eps,
                backend=moh_backend,
            )
            for heads in layers
        )
        attach_to_layers((m for m in self.modules() if isinstance(m, Router)), router_aux_loss_coef)
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=MODULATION_EPS)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """As in the DiT paper: blocks start as the identity and the output as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | Scorer):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.class_embedder, self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(weight.weight, std=0.02)
        for block in self.transformer_blocks:
            assert isinstance(block, MoHDiTBlock)
            block.init_weights()
        nn.init.zeros_(self.modulation_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def layer_configs(self) -> list[MoHConfig]:
        """The heads and routing of each layer; empty in a dense model."""
        attentions = (block.attn for block in self.transformer_blocks)
        return [attention.config for attention in attentions if isinstance(attention, MoHAttention)]

    @property
    def share(self) -> float:
        """Share of the heads that a token uses, over all layers, as the paper counts it; 1 in a dense model."""
        layers = self.layer_configs()
        used = sum(heads.num_shared + heads.active_heads for heads in layers)
        return used / sum(heads.num_heads for heads in layers) if layers else 1.0

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and variance) in noisy latents or images.

        Args:
            hidden_states: `[B, in_channels, sample_size, sample_size]`.
            timestep: `[B]` or a scalar: diffusion steps, integer or fractional.
            class_labels: `[B]` int64 from 0 to `num_classes`, which is "no class".
            return_dict: False returns a tuple.

        Returns:
            `.sample` `[B, out_channels, sample_size, sample_size]`: noise, then the variance's interpolation.

        Raises:
            ValueError: a shape or a class id is invalid.
        """
        self._check_inputs(hidden_states, timestep, class_labels)
        x = self.x_embedder(hidden_states).flatten(2).transpose(1, 2) + self.pos_embed  # [B, N, C]
        time = self.time_proj(timestep.expand(x.shape[0])).to(x.dtype)  # [B, 256]
        conditioning = self.time_embedder(time) + self.class_embedder(self._with_dropout(class_labels))  # [B, C]
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, conditioning)
            else:
                x = block(x, conditioning)
        conditioning = nn.functional.silu(conditioning)
        shift, scale = self.modulation_out(conditioning).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))  # [B, N, p * p * out_channels]
        grid, patch = self.config.sample_size // self.config.patch_size, self.config.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # [B, rows, columns, p, p, out_channels]
        sample = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _with_dropout(self, class_labels: Tensor) -> Tensor:
        probability = self.config.class_dropout_prob
        if not self.training or probability == 0:
            return class_labels
        dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
        return torch.where(dropped, self.config.num_classes, class_labels)

    def _check_inputs(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> None:
        c = self.config
        size, batch = c.sample_size, hidden_states.shape[0]  # len would fix it in an exported program
        if hidden_states.dim() != 4 or tuple(hidden_states.shape[1:]) != (c.in_channels, size, size):
            raise ValueError(
                f"hidden_states must have shape [B, in_channels = {c.in_channels}, sample_size = {size}, {size}], "
                f"got {list(hidden_states.shape)}"
            )
        if timestep.dim() > 1 or (timestep.dim() == 1 and timestep.shape[0] not in (1, batch)):
            raise ValueError(f"timestep must be a scalar or have shape [B = {batch}], got {list(timestep.shape)}")
        if class_labels.shape != (batch,):
            raise ValueError(f"class_labels must have shape [B = {batch}], got {list(class_labels.shape)}")
        if torch.compiler.is_compiling() or transforms_are_active() or class_labels.is_meta or batch == 0:
            return  # ids are data: neither a compiled graph nor vmap can branch on them
        low, high = (int(bound) for bound in class_labels.aminmax())
        if low < 0 or high > c.num_classes:
            raise ValueError(
                f"class_labels must be from 0 to num_classes - 1 = {c.num_classes - 1}, or {c.num_classes} for no class, "
                f"got {low if low < 0 else high}"
            )


def _check_sizes(
    head_dim: int, hidden: int, in_channels: int, out_channels: int, sample: int, patch: int, classes: int
) -> None:
    """Raise a ValueError that names the first size that is out of range."""
    for name, value in (
        ("attention_head_dim", head_dim),
        ("hidden_size", hidden),
        ("in_channels", in_channels),
        ("sample_size", sample),
        ("patch_size", patch),
        ("num_classes", classes),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if hidden % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 (sines and cosines of two axes), got {hidden}")
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"out_channels must be in_channels = {in_channels} (noise) or {2 * in_channels} (noise and variance), "
            f"got {out_channels}"
        )
    if sample % patch:
        raise ValueError(f"sample_size must be a multiple of patch_size = {patch}, got {sample}")
