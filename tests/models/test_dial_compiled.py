"""Promises of the dial under torch.compile: one graph holds for every setting, and it computes what eager execution does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moh
from moh.routing import ThresholdRouter

ROUTERS = ["two_stage", "single_stage", "query_norm", "linear", "threshold"]


class Counter:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def layer_of(router: str = "linear", unit: str = "head", **options: Any) -> moh.MoHAttention:
    torch.manual_seed(0)
    kwargs = {"shared_heads": 2, "active_heads": 4, "num_kv_heads": 12} | options
    if unit != "head":
        kwargs |= {"shared_heads": 4, "num_kv_heads": 4 if unit == "group_balanced" else 6}
    layer = moh.MoHAttention(
        48, 12 * (2 if unit != "head" else 1), router=router, routing_unit=unit, head_dim=4, **kwargs
    )
    if isinstance(layer.router, ThresholdRouter):
        layer.router.fit_thresholds(layer.router.contribution(torch.randn(500, 48)))
    return layer


def settings(layer: moh.MoHAttention) -> list[int]:
    """Every k, the fewest and the most first and last, in an order that goes up and down."""
    from moh.models.dial import allowed_counts

    counts = allowed_counts(layer.router)
    return counts[1::2] + counts[::-2]


@pytest.mark.parametrize(
    "router, unit",
    [
        (r, unit)
        for r in ROUTERS
        for unit in ("head", "group_balanced", "kv_group")
        if r != "threshold" or unit == "head"
    ],
)
def test_one_graph_of_a_layer_holds_for_every_setting(router: str, unit: str) -> None:
    layer, counter = layer_of(router, unit).eval(), Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 70, 48)
    with torch.no_grad():
        for k in settings(layer):
            moh.set_active_heads(compiled, k)
            torch.testing.assert_close(compiled(x, is_causal=True), layer(x, is_causal=True), rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


@pytest.mark.parametrize("backend", ["sdpa", "grouped", "reference"])
def test_other_backends_need_no_graph_per_setting(backend: str) -> None:
    layer, counter = layer_of(unit="group_balanced", backend=backend).eval(), Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        for k in settings(layer):
            moh.set_active_heads(compiled, k)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


def test_layers_with_different_settings_share_a_graph_in_any_combination() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layer_of() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    net, counter = Net().eval(), Counter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(1, 5, 48)
    combinations = [[4, 4, 4], [0, 10, 1], [10, 0, 0], [1, 1, 10], [2, 3, 4], [3, 2, 0], [5, 5, 5], [0, 0, 0],
                    [10, 10, 10], [7, 1, 6], [1, 0, 1]]  # fmt: skip
    with torch.no_grad():
        for ks in combinations:
            moh.set_active_heads(net, ks)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    counter = Counter()
    layers = [layer_of(active_heads=k).eval() for k in range(11)]
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        for layer in layers:
            expected = layer(x)
            layer.compile(backend=counter, fullgraph=True)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_and_the_balance_loss_follow_the_dial_in_one_graph(router: str) -> None:
    layer, counter = layer_of(router), Counter()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        with moh.record_routing(layer) as routing:
            return module(x).square().mean() + routing.balance_loss()

    compiled = torch.compile(lambda x: loss(layer, x), backend=counter, fullgraph=True)
    x = torch.randn(2, 9, 48)
    for k in settings(layer):
        moh.set_active_heads(layer, k)
        found = []
        for run in (compiled, lambda x: loss(layer, x)):
            layer.zero_grad()
            value = run(x)
            value.backward()
            grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
            found.append((value.detach(), copy.deepcopy(grads)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert counter.graphs <= 2  # a layer that routes nothing, k = 0, does not count in the mean balance loss


def test_the_default_compiler_agrees_too() -> None:
    layer = layer_of("two_stage").eval()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        for k in settings(layer):
            moh.set_active_heads(layer, k)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_an_exported_program_keeps_the_setting_of_its_export() -> None:
    layer = layer_of().eval()
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = layer(x)
        program = torch.export.export(layer, (x,)).module()
        moh.set_active_heads(layer, 9)
        torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: layer.to("meta").to_empty(device="cpu")])
def test_copies_and_moved_layers_keep_one_graph(make: Callable[[nn.Module], nn.Module]) -> None:
    layer, counter = make(layer_of()), Counter()
    layer.load_state_dict(layer_of().state_dict())
    layer.eval()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        for k in settings(layer):
            moh.set_active_heads(layer, k)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


def test_the_dial_adds_nothing_to_what_is_saved() -> None:
    layer = layer_of()
    assert not [name for name, _ in layer.named_buffers()]
    assert all(name.endswith(("weight", "bias")) for name in layer.state_dict())
