"""Promises of the two-stage router: the gates of the published models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moh import MoHConfig
from moh.routing import TwoStageRouter, build_router

C = 12

CASES = [
    pytest.param(8, 2, 3, id="2-shared-3-of-6"),
    pytest.param(8, 0, 3, id="none-shared"),
    pytest.param(8, 1, 3, id="one-shared"),
    pytest.param(8, 7, 1, id="a-single-routed-head"),
    pytest.param(8, 2, 6, id="all-active"),
    pytest.param(8, 8, 0, id="all-shared"),
    pytest.param(8, 1, 0, id="one-shared-alone"),
    pytest.param(8, [1, 6], 2, id="shared-1-and-6"),
    pytest.param(5, [4], 1, id="the-last-is-shared"),
]


def gates_of_one_token(router: TwoStageRouter, x: Tensor) -> Tensor:
    """The gates `[H]` of a token x `[C]`, head by head from the equations."""
    config = router.config
    h_s, k = config.num_shared, config.active_heads

    def softmax(weight: Tensor) -> list[Tensor]:
        exponentials = [torch.exp((row * x).sum()) for row in weight.double()]
        return [e / sum(exponentials) for e in exponentials]

    one = x.new_ones(())
    two_stages = h_s and k and config.router == "two_stage"
    a_1, a_2 = softmax(router.stage.weight) if two_stages else (one, one)
    stage_factor = 2 if two_stages else 1
    gates = [x.new_zeros(()) for _ in range(config.num_heads)]
    shared = softmax(router.shared.weight) if h_s > 1 else [one] * h_s
    for head, share in zip(config.shared_indices, shared, strict=True):
        gates[head] = stage_factor * a_1 * share * h_s
    if k:
        p = softmax(router.routed.weight)
        chosen = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        total = sum(p[i] for i in chosen)
        for i in chosen:
            gates[config.routed_indices[i]] = stage_factor * a_2 * k * p[i] / total
    return torch.stack(gates)


def directly(router: TwoStageRouter, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([gates_of_one_token(router, t) for t in row]) for row in x.double()])


@pytest.mark.parametrize("kind", ["two_stage", "single_stage"])
@pytest.mark.parametrize("heads, shared, active", CASES)
def test_gates_and_their_gradients_are_those_of_the_equations(heads, shared, active, kind):
    router = build_router(MoHConfig(heads, shared, active, kind), C)
    x = torch.randn(2, 3, C, requires_grad=True)
    weight = torch.randn(2, 3, heads)
    parameters = [x, *router.parameters()]

    expected = directly(router, x)
    got = router(x).gates
    torch.testing.assert_close(got, expected.float())

    # a single shared head with no routed ones has the constant gate 1: nothing to learn
    if expected.requires_grad:
        expected_grads = torch.autograd.grad((expected * weight).sum(), parameters, materialize_grads=True)
        got_grads = torch.autograd.grad((got * weight).sum(), parameters, materialize_grads=True)
        for a, b in zip(got_grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert not got.requires_grad


@pytest.mark.parametrize("heads, shared, active", CASES)
def test_uniform_published_router_weighs_every_active_head_1(heads, shared, active):
    router = build_router(MoHConfig(heads, shared, active), C)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    info = router(torch.randn(2, 3, C))
    torch.testing.assert_close(info.gates[info.active], torch.ones_like(info.gates[info.active]))
    assert (info.active.sum(-1) == router.config.num_shared + active).all()


@pytest.mark.parametrize("heads, shared, active", CASES)
def test_every_token_uses_the_shared_heads_and_exactly_k_others(heads, shared, active):
    router = build_router(MoHConfig(heads, shared, active), C)
    info = router(3 * torch.randn(2, 20, C))
    assert info.active[..., list(router.config.shared_indices)].all()
    assert (info.active[..., list(router.config.routed_indices)].sum(-1) == active).all()
    assert (info.gates[~info.active] == 0).all()


@pytest.mark.parametrize(
    "shared, active, names",
    [
        pytest.param(2, 3, {"shared.weight": (2, C), "routed.weight": (6, C), "stage.weight": (2, C)}, id="all-three"),
        pytest.param(0, 3, {"routed.weight": (8, C)}, id="none-shared"),
        pytest.param(1, 3, {"routed.weight": (7, C), "stage.weight": (2, C)}, id="one-shared"),
        pytest.param(8, 0, {"shared.weight": (8, C)}, id="all-shared"),
        pytest.param(1, 0, {}, id="one-shared-alone"),
    ],
)
def test_parameters_are_those_that_the_equations_need(shared, active, names):
    router = TwoStageRouter(MoHConfig(8, shared, active), C)
    assert {name: tuple(p.shape) for name, p in router.state_dict().items()} == names


def test_bfloat16_gates_come_from_float32_softmax():
    config = MoHConfig(8, 2, 3)
    router = build_router(config, C, dtype=torch.bfloat16)
    x = torch.randn(4, 9, C, dtype=torch.bfloat16)
    info = router(x)
    assert info.gates.dtype == torch.bfloat16
    assert info.probs.dtype == torch.float32
    assert (info.active.sum(-1) == 5).all()
    torch.testing.assert_close(info.probs.sum(-1), torch.ones(4, 9))
    exact = TwoStageRouter(config, C)
    exact.load_state_dict(router.state_dict())
    exact = exact(x.float())
    same = (exact.active == info.active).all(-1)  # near ties may be decided differently
    assert same.float().mean() > 0.8
    torch.testing.assert_close(info.gates.float()[same], exact.gates[same], rtol=0.03, atol=0.03)


def test_sure_router_gives_finite_gates_and_gradients():
    router = build_router(MoHConfig(8, 2, 3), C)
    x = (1e4 * torch.randn(2, 5, C)).requires_grad_()
    gates = router(x).gates
    gates.sum().backward()
    assert gates.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_missing_input_is_named():
    with pytest.raises(ValueError, match="x must be given: the 'two_stage' router decides by it"):
        build_router(MoHConfig(8, 2, 3), C)(q=torch.randn(1, 1, 8, 4))
