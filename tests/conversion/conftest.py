"""Tiny dense models of each convertible family, and what passes through their attention, collected by definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
FAMILY_OPTIONS = {
    "Llama": dict(tie_word_embeddings=True),
    "Mistral": dict(sliding_window=5),
    "Qwen2": dict(),
    "Qwen3": dict(head_dim=8),
}


@pytest.fixture
def make_dense() -> Callable[..., Any]:
    """`make_dense(family, **config)`: a model in evaluation mode whose attention matters and whose biases aren't zero."""

    def make(family: str = "Llama", **options: Any) -> Any:
        config = getattr(transformers, f"{family}Config")(**TINY | FAMILY_OPTIONS.get(family, {}) | options)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 or "bias" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def tokens() -> Tensor:
    """Calibration ids `[24, 16]`."""
    return torch.randint(64, (24, 16), generator=torch.Generator().manual_seed(2))


@dataclass
class Seen:
    """One layer: its attention's input x `[T, C]` and its heads z `[T, H, D]`, concatenated before W_O."""

    x: Tensor
    z: Tensor


@pytest.fixture
def watch() -> Callable[[nn.Module, Tensor], list[Seen]]:
    """`watch(model, tokens)`: what each layer's attention sees, float64."""

    def run(model: Any, tokens: Tensor) -> list[Seen]:
        seen = []
        heads = model.config.num_attention_heads
        handles = []
        for layer in model.model.layers:
            entry = Seen(torch.empty(0), torch.empty(0))
            seen.append(entry)

            def see_x(module: nn.Module, args: Any, kwargs: Any, entry: Seen = entry) -> None:
                entry.x = kwargs["hidden_states"].flatten(0, 1).double()

            def see_z(module: nn.Module, args: Any, entry: Seen = entry) -> None:
                entry.z = args[0].flatten(0, 1).unflatten(-1, (heads, -1)).double()

            handles.append(layer.self_attn.register_forward_pre_hook(see_x, with_kwargs=True))
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(see_z))
        with torch.no_grad():
            model(tokens)
        for handle in handles:
            handle.remove()
        return seen

    return run
