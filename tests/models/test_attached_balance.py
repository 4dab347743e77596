"""Promises of `router_aux_loss_coef` in models of timm and diffusers: any training loop's gradient has the balance loss, once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm", reason="the vision extra is not installed")
pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

import timm

import moh
from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.models.timm import from_pretrained, save_pretrained
from moh.routing import Router

COEFFICIENT = 0.3
MICRO = dict(depth=3, embed_dim=40, num_heads=5, num_classes=4)
VIT = dict(shared_heads=[1, 1, 5], active_heads=[2, 1, 0])
TRANSNEXT = dict(embed_dims=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2), sr_ratios=(2, 1),
                 shared_heads=(1, 2), active_heads=(1, 1), img_size=8, patch_size=1, num_classes=4)  # fmt: skip
DIT = dict(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, num_classes=5, in_channels=3,
           shared_heads=[4, 1, 2], active_heads=[0, 2, 1], class_dropout_prob=0.0)  # fmt: skip
MAKERS: dict[str, Callable[..., Any]] = {
    "vit": lambda **o: timm.create_model("moh_vit_micro_patch4_28_50", **MICRO, **VIT, **o),
    "vit-linear": lambda **o: timm.create_model("moh_vit_micro_patch4_28_50", **MICRO, **VIT, router="linear", **o),
    "transnext": lambda **o: timm.create_model("moh_transnext_micro32_50", **TRANSNEXT, **o),
    "dit": lambda **o: MoHDiTTransformer2DModel(**DIT, **o),
    "dit-query_norm": lambda **o: MoHDiTTransformer2DModel(**DIT, router="query_norm", **o),
}
every_model = pytest.mark.parametrize("kind", MAKERS)


def made(kind: str, coefficient: float = COEFFICIENT, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = MAKERS[kind](router_aux_loss_coef=coefficient, **options).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model


def batches(kind: str, count: int = 1) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    side = 28 if kind.startswith("vit") else 8
    images = torch.randn(count * 4, 3, side, side, generator=generator)
    labels = torch.arange(count * 4) % 4
    parts: tuple[Tensor, ...] = (images, labels)
    if kind.startswith("dit"):
        noise = torch.randn(count * 4, 6, 8, 8, generator=generator)
        parts = (images, torch.randint(1000, labels.shape, generator=generator), labels, noise)
    return list(zip(*(part.split(4) for part in parts), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """As timm's and diffusers' training scripts compute it."""
    if len(batch) == 2:
        return F.cross_entropy(model(batch[0]), batch[1])
    return F.mse_loss(model(*batch[:3]).sample.float(), batch[3])


def by_hand(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    with moh.record_routing(model) as routing:
        loss = loss_of(model, batch)
    return loss + COEFFICIENT * routing.balance_loss()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = rtol * (0.01 + float(gradient.abs().max()))
        torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def differs(got: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any((got[name] - other[name]).abs().max() > 1e-3 * other[name].abs().max() for name in other)


@every_model
def test_a_bare_loop_has_the_gradient_of_the_loss_and_the_balance_loss(kind) -> None:
    (batch,) = batches(kind)
    model, plain = made(kind), made(kind, 0.0)
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss, loss_of(plain, batch), rtol=0, atol=0)  # the loss itself is without it
    loss.backward()
    by_hand(plain, batch).backward()
    expected, got = gradients(plain), gradients(model)
    assert_same(got, expected)
    loss_of(plain, batch).backward()
    assert differs(expected, gradients(plain))


@every_model
def test_a_loop_that_adds_the_balance_loss_itself_gets_no_second_one(kind) -> None:
    (batch,) = batches(kind)
    model, plain = made(kind), made(kind, 0.0)
    for one in (model, plain):
        by_hand(one, batch).backward()
    assert_same(gradients(model), gradients(plain))
    with moh.record_routing(model) as routing:  # only watched
        loss_of(model, batch).backward()
    assert routing.balance_loss() > 0
    by_hand(plain, batch).backward()
    assert_same(gradients(model), gradients(plain))


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16-GradScaler"])
def test_autocast_a_scaler_and_accumulated_batches_leave_the_balance_its_weight(kind, dtype) -> None:
    found = []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    for model, loss in ((made(kind), loss_of), (made(kind, 0.0), by_hand)):
        optimiser = torch.optim.SGD(model.parameters())
        for batch in batches(kind, 2):
            with torch.autocast("cpu", dtype), moh.loss_scale(scaler.get_scale() / 2):
                value = loss(model, batch) / 2
            scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        found.append(gradients(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    assert_same(*found, rtol=0.02)


@pytest.mark.parametrize("kind", ["vit", "dit"])
def test_float16_without_the_scale_is_refused_and_not_silently_unbalanced(kind) -> None:
    (batch,) = batches(kind)
    model = made(kind)
    with torch.autocast("cpu", torch.float16):
        loss, own = loss_of(model, batch), by_hand(model, batch)
    own.backward()
    with pytest.raises(RuntimeError, match=r"with moh.loss_scale\(scaler.get_scale\(\)\)"):
        loss.backward()


@every_model
def test_gradient_checkpointing_and_compiling_change_nothing(kind) -> None:
    (batch,) = batches(kind)
    model = made(kind)
    loss_of(model, batch).backward()
    expected = gradients(model)
    if kind.startswith("dit"):
        model.enable_gradient_checkpointing()
    else:
        model.set_grad_checkpointing()
    loss_of(model, batch).backward()
    assert_same(gradients(model), expected)
    if kind == "vit":
        torch.compiler.reset()
        model = made(kind)
        loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), batch).backward()
        assert_same(gradients(model), expected)


def test_reentrant_checkpointing_balances_too() -> None:
    (batch,) = batches("dit")
    model = made("dit")
    loss_of(model, batch).backward()
    expected = gradients(model)
    model.enable_gradient_checkpointing(
        lambda block, *inputs: torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=True)
    )
    loss_of(model, batch).backward()
    assert_same({n: g for n, g in gradients(model).items() if n in expected}, expected)


@every_model
def test_nothing_is_attached_without_a_coefficient_in_evaluation_or_without_gradients(kind) -> None:
    (batch,) = batches(kind)
    for model, grad in ((made(kind, 0.0), True), (made(kind).eval(), True), (made(kind), False)):
        with torch.set_grad_enabled(grad), moh.record_routing(model) as routing:
            loss_of(model, batch)
        assert not any("Attached" in str(info.gates.grad_fn) for _, info in routing)


def test_the_coefficient_is_saved_copied_and_follows_the_dial(tmp_path) -> None:
    model = made("vit")
    save_pretrained(model, tmp_path / "vit")
    dit = made("dit")
    dit.save_pretrained(tmp_path / "dit")
    loaded = (from_pretrained(tmp_path / "vit"), MoHDiTTransformer2DModel.from_pretrained(tmp_path / "dit"))
    for other in (*loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(dit))):
        kept = {id(m.balance): m.balance for m in other.modules() if isinstance(m, Router)}
        assert [(b.coefficient, b.layers) for b in kept.values()] == [(COEFFICIENT, 2)]
    model = timm.create_model("moh_vit_micro_patch4_28_50", **MICRO, shared_heads=1, active_heads=2, router="linear",
                              router_aux_loss_coef=COEFFICIENT)  # fmt: skip
    moh.set_active_heads(model, [0, 1, 0])
    (batch,) = batches("vit")
    found = []
    for loss in (loss_of, by_hand):
        loss(model.train(), batch).backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_coefficient_below_0_is_refused(kind) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be at least 0, got -1"):
        made(kind, -1.0)


DENSE: dict[str, Callable[..., Any]] = {
    "transnext": lambda **o: timm.create_model("moh_transnext_micro32_dense", **o),
    "dit": lambda **o: MoHDiTTransformer2DModel(**DIT | dict(shared_heads=None, active_heads=None), **o),
}


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_model_has_nothing_to_balance(kind) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0 for a model without routed heads, got 0.3"):
        DENSE[kind](router_aux_loss_coef=0.3)
