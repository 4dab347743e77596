"""Promises of transformers' ViT with MoH attention, in addition to tests/conversion/test_families.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the llm extra is not installed")


import moh
from moh.models.transformers import MoHViTConfig, MoHViTForImageClassification

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=4,
    num_labels=5,
)


def make(**options: Any) -> MoHViTForImageClassification:
    torch.manual_seed(0)
    model = MoHViTForImageClassification(MoHViTConfig(**TINY | dict(shared_heads=1, active_heads=2) | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("router", ["two_stage", "linear", "query_norm"])
@torch.no_grad()
def test_every_backend_gives_what_the_definition_gives(router) -> None:
    model = make(router=router)
    fast = model(images()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(images()).logits, fast, rtol=1e-4, atol=1e-5)
    with moh.record_routing(model) as routing:
        model(images())
    assert routing.share() == pytest.approx(0.75) == model.config.share


def test_accumulated_calls_add_up_to_the_balance_loss_of_a_step() -> None:
    model, labels = make(router_aux_loss_coef=0.5).train(), torch.tensor([0, 3, 4])
    whole = model(images(), labels=labels)
    task = torch.nn.functional.cross_entropy(whole.logits, labels)
    parts = [model(images()[s], labels=labels[s], num_items_in_batch=3) for s in (slice(0, 1), slice(1, 3))]
    balance = sum(w * p.aux_loss for w, p in zip((1 / 3, 2 / 3), parts, strict=True))
    assert torch.allclose(sum(p.loss for p in parts), task + 0.5 * balance)


def test_reentrant_checkpointing_that_would_lose_the_balance_gradient_is_refused() -> None:
    model, labels = make(router_aux_loss_coef=0.5).train(), torch.tensor([0, 3, 4])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="balance loss has no gradient"):
        model(images(), labels=labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(images(), labels=labels).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(active_heads=4), r"layer 0: active_heads must be between 0 and num_heads - shared_heads = 3, got 4"),
        (dict(shared_heads=[1]), r"shared_heads must be a number or a list with one entry per layer \(2\)"),
        (dict(router_aux_loss_coef=-1.0), r"router_aux_loss_coef must be at least 0, got -1.0"),
    ],
    ids=["too-many", "layers", "coefficient"],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message) -> None:
    with pytest.raises(Exception, match=message):  # transformers wraps what a strict dataclass raises
        make(**options)


@torch.no_grad()
def test_other_image_sizes_work_with_interpolated_positions() -> None:
    assert make()(torch.randn(1, 3, 24, 24), interpolate_pos_encoding=True).logits.shape == (1, 5)
    with pytest.raises(ValueError, match="doesn't match model"):
        make()(torch.randn(1, 3, 24, 24))


@torch.no_grad()
def test_exported_and_compiled_models_give_the_same() -> None:
    torch.compiler.reset()
    model, x = make(), images()
    expected = model(x).logits
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x).logits, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).logits, expected)
