"""Promises of the contribution router: the largest predictions are active, gates are 1, gradients reach predictions."""

from __future__ import annotations

import pytest
import torch

from moh import MoHConfig
from moh.routing import build_router

C = 12


def router_of(shared, active, **options):
    return build_router(MoHConfig(8, shared, active, "linear"), C, **options)


@pytest.mark.parametrize(
    "shared, active",
    [
        pytest.param(3, 2, id="3-shared-2-of-5"),
        pytest.param(0, 2, id="none-shared"),
        pytest.param(3, 5, id="all-active"),
        pytest.param(8, 0, id="all-shared"),
        pytest.param(3, 0, id="shared-alone"),
        pytest.param([7, 1, 4], 2, id="shared-7-1-4"),
        pytest.param([0, 7], 1, id="first-and-last-shared"),
    ],
)
def test_heads_with_the_largest_predictions_are_active(shared, active):
    router = router_of(shared, active)
    x = torch.randn(2, 4, C)
    predictions = x @ router.contribution.weight.T + router.contribution.bias
    info = router(x)
    routed_heads = router.config.routed_indices
    for b in range(2):
        for t in range(4):
            largest = sorted(routed_heads, key=lambda i: predictions[b, t, i].item())[len(routed_heads) - active :]
            expected = [1.0 if i in router.config.shared_indices or i in largest else 0.0 for i in range(8)]
            assert info.gates[b, t].tolist() == expected
    if active:
        torch.testing.assert_close(info.probs, predictions[..., list(routed_heads)].softmax(-1))
    else:
        assert info.probs is None


def test_gradient_of_a_routed_gate_goes_to_its_prediction_and_that_of_a_shared_one_nowhere():
    router = router_of([1, 6], 2)
    x, weight = torch.randn(2, 4, C), torch.randn(2, 4, 8)
    (router(x).gates * weight).sum().backward()
    expected_bias = weight.sum((0, 1))
    expected_bias[[1, 6]] = 0
    torch.testing.assert_close(router.contribution.bias.grad, expected_bias)
    expected_weight = torch.einsum("bnh,bnc->hc", weight, x)
    expected_weight[[1, 6]] = 0
    torch.testing.assert_close(router.contribution.weight.grad, expected_weight)


def test_one_fit_serves_any_set_of_shared_heads():
    few, other = router_of([1, 6], 2), router_of(0, 5)
    assert few.state_dict().keys() == {"contribution.weight", "contribution.bias"}
    other.load_state_dict(few.state_dict())


def test_bfloat16_gates_are_exactly_1_and_0():
    router = router_of(2, 3, dtype=torch.bfloat16)
    x = (100 * torch.randn(2, 4, C)).to(torch.bfloat16)
    info = router(x)
    assert info.gates.dtype == torch.bfloat16
    assert info.probs.dtype == torch.float32
    assert set(info.gates.unique().tolist()) == {0.0, 1.0}
    info.gates.sum().backward()
    assert router.contribution.weight.grad.dtype == torch.bfloat16


def test_gates_are_known_before_the_queries():
    assert not router_of(2, 3).reads_queries


def test_missing_input_is_named():
    with pytest.raises(ValueError, match="x must be given: the 'linear' router decides by it"):
        router_of(2, 3)(q=torch.randn(1, 1, 8, 4))


def test_gradient_of_the_gates_reaches_the_router_and_not_the_input() -> None:
    router = build_router(MoHConfig(4, 1, 2, "linear"), 8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    router(x=x).gates.square().sum().backward()
    assert x.grad is None
    assert router.contribution.weight.grad.abs().sum() > 0


def test_gates_of_a_frozen_router_are_constants() -> None:
    router = build_router(MoHConfig(4, 1, 2, "linear"), 8).requires_grad_(False)
    assert not router(x=torch.randn(2, 5, 8, requires_grad=True)).gates.requires_grad
