"""What fewer heads can save in a model, from the shapes of its weights: nothing is loaded but its configuration.

Counted are the multiplications of one forward pass over N tokens, per token, in the layers: their projections, and q k^T and
the sum over values. Embeddings and the output layer are left out: a prompt needs the output of its last token alone, an
image that of one. What is saved is an upper bound on the time saved, because choosing and skipping heads costs time too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moh.config import FIXED
from moh.conversion.convert import dense_class
from moh.conversion.dense import DenseImageModel
from moh.conversion.transformers import adapter
from moh.models.hub import kind_at, timm_name
from moh.models.transformers.families import family_of, supported_positions
from moh.models.transformers.family import at
from moh.models.transformers.loading import load_config
from moh.routing import router_class

LENGTHS = (512, 4_096, 32_768)
"""Tokens of a text for which a plan is made by default."""

NEXT_TO_NOTHING = 0.05
"""A smaller part of the multiplications is lost again in choosing and skipping heads."""


@dataclass(frozen=True)
class Layer:
    """One attention layer and what belongs to the same block, in multiplications per token unless stated otherwise.

    Attributes:
        width: C, of the layer's input.
        num_heads: h.
        kv_heads: heads of keys and values.
        head_width: D.
        window: tokens that a token can see, itself included; None for all.
    """

    width: int
    num_heads: int
    kv_heads: int
    head_width: int
    window: int | None = None

    @property
    def queries(self) -> int:
        """Multiplications of the query projection, which are as many as those of W_O."""
        return self.width * self.num_heads * self.head_width

    def core(self, tokens: int, *, causal: bool) -> float:
        """Of q k^T and of the sum over the values, each token with those that it sees, in the mean over `tokens` tokens."""
        window = tokens if self.window is None else min(self.window, tokens)
        # the first `window` tokens see 1, 2, ... tokens, the others `window`
        seen = (window * (window + 1) / 2 + (tokens - window) * window) / tokens if causal else float(window)
        return 2 * self.num_heads * self.head_width * seen

    def cache(self, tokens: int) -> int:
        """Numbers in the cache of keys and values of `tokens` tokens."""
        return 2 * self.kv_heads * self.head_width * (tokens if self.window is None else min(self.window, tokens))


@dataclass(frozen=True)
class Work:
    """Where the multiplications of a forward pass are, as shares that add up to 1.

    Attributes:
        tokens: N.
        core: the attention's core.
        projections: of queries and to the output, W_Q and W_O.
        rest: keys, values, MLPs.
        cache_bytes: of the cache of keys and values for one sequence; None if the model keeps none.
    """

    tokens: int
    core: float
    projections: float
    rest: float
    cache_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """A model's shapes.

    Attributes:
        name: the kind of the model.
        layers: its attention layers.
        rest: multiplications per token of everything else in the layers but for W_Q and W_O.
        causal: whether tokens see only those before them.
        lengths: numbers of tokens to plan for, ascending.
        positions: the longest text that the model supports; None if there is no limit.
        bytes_per_number: of the cache.
        dtype: of the cache.
        router: what `moh.convert` uses by default.
    """

    name: str
    layers: tuple[Layer, ...]
    rest: int
    causal: bool
    lengths: tuple[int, ...]
    positions: int | None = None
    bytes_per_number: int = 4
    dtype: str = "float32"
    router: str = "linear"

    def work(self, tokens: int) -> Work:
        """Where the work of a forward pass over `tokens` tokens is."""
        core = sum(layer.core(tokens, causal=self.causal) for layer in self.layers)
        projections = 2 * sum(layer.queries for layer in self.layers)
        total = core + projections + self.rest
        cache = sum(layer.cache(tokens) for layer in self.layers) * self.bytes_per_number if self.causal else None
        return Work(tokens, core / total, projections / total, self.rest / total, cache)

    def saved(self, share: float, tokens: int, *, router: str | None = None) -> float:
        """Part of the multiplications that a share of the heads saves at most; below 0 where choosing costs more.

        Args:
            share: of all heads, in (0, 1].
            tokens: N.
            router: one that reads the queries needs all of them; others cost a projection to h scores, fixed heads
                nothing. None means `router`.
        """
        router = router or self.router
        reads_queries = router != FIXED and router_class(router).reads_queries
        saved = cost = total = 0.0
        for layer in self.layers:
            core = layer.core(tokens, causal=self.causal)
            saved += (1 - share) * (core + layer.queries * (1 if reads_queries else 2))
            cost += 0 if reads_queries or router == FIXED else layer.width * layer.num_heads
            total += core + 2 * layer.queries
        return (saved - cost) / (total + self.rest) if share < 1 else 0.0


def plan(path: str | Path, *, revision: str | None = None, lengths: Sequence[int] = LENGTHS) -> Plan:
    """The plan of the dense model at a path, which is read as `moh.convert` reads it, without its weights.

    Args:
        path: as for `moh.convert`.
        revision: of a hub name.
        lengths: tokens of a text; models of images and diffusion have their own number instead. The longest text that the
            model supports stands for lengths beyond it.

    Raises:
        ValueError: the model can't be converted, or its configuration can't be read.
    """
    kind = kind_at(path, revision=revision)
    if kind.task == "diffusion":
        return _of_diffusion(path, revision)
    if kind.library == "timm":
        return _of_timm(path, revision)
    config: Any = load_config(path, revision=revision)
    model = _on_meta(dense_class(config), config)
    dense = adapter(model, "linear", copied=False)
    family = family_of(config.model_type)
    assert family is not None
    inner = at(model.base_model, family.layers)
    windows = _windows(config, len(dense.attentions))
    queries = dense.num_heads * dense.attentions[0].output_weight.shape[1] // dense.num_heads
    width = queries // dense.num_heads
    kv_heads = dense.kv_heads or dense.num_heads
    layers = tuple(
        Layer(attention.width, dense.num_heads, kv_heads, width, window)
        for attention, window in zip(dense.attentions, windows, strict=True)
    )
    if isinstance(dense, DenseImageModel):
        size = config.image_size
        image = torch.empty(
            1, config.num_channels, *(size if isinstance(size, Sequence) else (size, size)), device="meta"
        )
        tokens = dense.tokens_per_sample(image)
        return Plan(config.model_type, layers, _rest(inner, layers), False, (tokens,))
    positions = supported_positions(config)
    fitting = tuple(sorted({n if positions is None else min(n, positions) for n in lengths}))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Plan(
        config.model_type,
        layers,
        _rest(inner, layers),
        not family.encoder,
        fitting,
        positions,
        dtype.itemsize,
        str(dtype).removeprefix("torch."),
        "linear" if family.encoder else "threshold",
    )


def _of_timm(path: str | Path, revision: str | None) -> Plan:
    from moh._extras import require

    timm = require("timm", extra="vision")
    from moh.conversion.timm import DenseTimmViT
    from moh.models.timm.loading import check_local_model

    name, local = timm_name(path, revision), Path(path).expanduser()
    if local.is_dir():
        check_local_model(local)
        name = f"local-dir:{local}"
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False)
    dense = DenseTimmViT(model)
    h = dense.num_heads
    layers = tuple(Layer(a.width, h, h, a.output_weight.shape[1] // h) for a in dense.attentions)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return Plan(
        model.pretrained_cfg.get("architecture") or str(path), layers, _rest(model.blocks, layers), False, (tokens,)
    )


def _of_diffusion(path: str | Path, revision: str | None) -> Plan:
    from moh.conversion.diffusers import dit_without_weights

    model: Any = dit_without_weights(path, revision=revision)
    c = model.config
    h, width = c["num_attention_heads"], c["num_attention_heads"] * c["attention_head_dim"]
    layers = (Layer(width, h, h, c["attention_head_dim"]),) * c["num_layers"]
    tokens = (c["sample_size"] // c["patch_size"]) ** 2
    # the modulation (norm1) is computed once per image, not per token
    linears = {name: m for name, m in model.transformer_blocks.named_modules() if ".norm" not in name}
    return Plan(type(model).__name__, layers, _rest(linears, layers), False, (tokens,), router="two_stage")


def _on_meta(kind: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        if kind in (AutoModel, AutoModelForCausalLM):
            return kind.from_config(config, trust_remote_code=False)
        return kind(config)


def _windows(config: Any, count: int) -> list[int | None]:
    """How many tokens each attention layer sees; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if "attention" in kind]
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * count
    if len(kinds) != count:
        return [window] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rest(blocks: nn.Module | Mapping[str, nn.Module], layers: Sequence[Layer]) -> int:
    """Multiplications per token of the blocks' projections and convolutions but for W_Q and W_O."""
    modules = blocks.modules() if isinstance(blocks, nn.Module) else blocks.values()
    known = (nn.Linear, Conv1D, nn.Conv1d)
    weights = sum(math.prod(module.weight.shape) for module in modules if isinstance(module, known))
    return weights - 2 * sum(layer.queries for layer in layers)
