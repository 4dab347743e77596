"""Tiny language models, a Llama by default, and a helper to compare them with transformers' own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the llm extra is not installed")

import moh.models.transformers

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
HEADS = dict(shared_heads=1, active_heads=2)


def stir(model: nn.Module) -> None:
    """Makes weights large enough for the attention to matter; freshly initialised ones nearly average the values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
            elif "bias" in name:
                parameter.normal_(std=0.2)


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    def make(family: str = "Llama", **options: Any) -> Any:
        return getattr(moh.models.transformers, f"MoH{family}Config")(**TINY | HEADS | options)

    return make


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., Any]:
    def make(family: str = "Llama", **options: Any) -> Any:
        torch.manual_seed(0)
        kind = getattr(moh.models.transformers, f"MoH{family.removesuffix('Text')}ForCausalLM")
        model = kind(tiny_config(family, **options)).eval()
        stir(model)
        return model

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def stirred() -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        stir(model)
        return model.eval()

    return make
