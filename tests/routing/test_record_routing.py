"""Promises of `record_routing`: it records each forward pass once, whatever wraps the model, and leaves no trace."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moh import MoHAttention, record_routing

C = 16


class Net(nn.Module):
    """Layers that route by x, by the queries and not at all."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(
            [
                MoHAttention(C, 4, shared_heads=1, active_heads=2, router="two_stage"),
                MoHAttention(C, 4, shared_heads=1, active_heads=1, router="query_norm"),
                MoHAttention(C, 4, shared_heads=4, active_heads=0, router="linear"),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


NAMES = [f"layers.{i}.router" for i in range(3)]


def inputs() -> Tensor:
    return torch.randn(2, 5, C)


def names(routing) -> list[str]:
    return [name for name, _ in routing]


def train_step(model: nn.Module, net: Net, x: Tensor):
    """Gradients of `net`, run as `model`, on a task loss with a balance loss, and the record."""
    with record_routing(model) as routing:
        loss = model(x).square().mean()
    loss = loss + 0.1 * routing.balance_loss()
    loss.backward()
    # the last layer's router decides nothing, so its parameters get no gradient
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return grads, routing


def test_layers_are_recorded_by_name_in_the_order_of_the_calls():
    net = Net()
    with record_routing(net) as routing:
        net(inputs())
        net(inputs())
    assert names(routing) == NAMES * 2
    assert len(routing) == 6
    assert [info.config for _, info in routing] == [layer.config for layer in net.layers] * 2
    assert all(info.gates.shape == (2, 5, 4) for _, info in routing)


def test_recorded_routing_is_the_one_that_the_layer_used():
    layer = MoHAttention(C, 4, shared_heads=1, active_heads=2)
    with record_routing(layer) as routing:
        _, returned = layer(inputs(), return_routing=True)
    assert routing.layers[0][1] is returned


def test_balance_loss_is_the_mean_over_the_layers_that_route():
    net = Net()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with record_routing(net) as routing:
        net(inputs())
    first, second, _ = (info for _, info in routing)
    torch.testing.assert_close(routing.balance_loss(), (first.balance_loss() + second.balance_loss()) / 2)
    torch.testing.assert_close(routing.balance_loss(mask), (first.balance_loss(mask) + second.balance_loss(mask)) / 2)


def test_balance_loss_of_layers_that_route_nothing_is_0():
    layer = MoHAttention(C, 4, shared_heads=4, active_heads=0)
    with record_routing(layer) as routing:
        layer(inputs())
    assert routing.balance_loss().item() == 0


def test_balance_loss_trains_the_router():
    layer = MoHAttention(C, 4, shared_heads=1, active_heads=2)
    with record_routing(layer) as routing:
        layer(inputs())
    routing.balance_loss().backward()
    assert layer.router.routed.weight.grad.abs().sum() > 0
    assert layer.router.shared is None and layer.router.stage.weight.grad is None


def test_load_and_share_say_what_was_used():
    net = Net()
    with record_routing(net) as routing:
        net(inputs())
        net(inputs())
    load = routing.load()
    assert list(load) == NAMES
    assert load[NAMES[0]].sum().item() == pytest.approx(3)  # one shared, two routed
    assert load[NAMES[1]].sum().item() == pytest.approx(2)
    assert load[NAMES[2]].tolist() == [1.0] * 4
    assert routing.share() == pytest.approx((3 + 2 + 4) / 12)
    assert not load[NAMES[0]].requires_grad


def test_nothing_recorded_is_said():
    with record_routing(nn.Linear(2, 2)) as routing:
        pass
    assert len(routing) == 0
    for ask in (routing.balance_loss, routing.share):
        with pytest.raises(ValueError, match="nothing was recorded: run the model inside"):
            ask()


def test_two_models_do_not_see_each_other():
    one, other = Net(), Net()
    x, y = inputs(), inputs()
    with record_routing(one) as of_one, record_routing(other) as of_other:
        one(x)
        other(y)
    assert len(of_one) == len(of_other) == 3
    with record_routing(one) as alone:
        one(x)
    assert torch.equal(of_one.layers[0][1].gates, alone.layers[0][1].gates)
    assert not torch.equal(of_one.layers[0][1].gates, of_other.layers[0][1].gates)


def test_every_token_counts_alike_in_the_share_whatever_the_batches_are():
    layer = MoHAttention(16, 4, shared_heads=1, active_heads=2, router="threshold")
    x = torch.randn(5, 7, 16)
    layer.router.fit_thresholds(layer.router.contribution(x).flatten(0, 1))
    with record_routing(layer) as whole:
        layer(x)
    with record_routing(layer) as parts:
        for part in x.split(3):
            layer(part)
    assert whole.layers[0][1].active.sum(-1).unique().numel() > 1
    assert parts.share() == pytest.approx(whole.share())


def test_nested_blocks_each_record_what_runs_inside_them():
    net = Net()
    with record_routing(net) as outer:
        net(inputs())
        with record_routing(net.layers[1]) as inner:
            net(inputs())
        net(inputs())
    assert names(outer) == NAMES * 3
    assert names(inner) == ["router"]
    assert inner.layers[0][1] is outer.layers[4][1]


def test_nothing_is_recorded_after_the_block():
    net = Net()
    with record_routing(net) as routing:
        net(inputs())
    net(inputs())
    assert len(routing) == 3


def test_exception_inside_the_block_ends_the_recording_and_passes_through():
    net = Net()
    with pytest.raises(RuntimeError, match="stop here"), record_routing(net) as routing:
        net(inputs())
        raise RuntimeError("stop here")
    net(inputs())
    assert len(routing) == 3
    assert all(layer.router._recorders == () for layer in net.layers)


def test_recording_changes_neither_the_output_nor_the_state():
    net, x = Net(), inputs()
    before, keys = net(x), list(net.state_dict())
    with record_routing(net):
        assert torch.equal(net(x), before)
        assert list(net.state_dict()) == keys


def test_gradient_checkpointing_records_once_and_gives_the_same_gradients():
    net, x = Net(), inputs()
    expected, plain = train_step(net, net, x)
    net.checkpointed = True
    grads, routing = train_step(net, net, x)
    assert names(routing) == names(plain) == NAMES
    assert grads.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], msg=name)


def test_gradient_checkpointing_records_once_when_the_backward_pass_runs_inside_the_block():
    net = Net(checkpointed=True)
    with record_routing(net) as routing:
        net(inputs()).sum().backward()
        assert names(routing) == NAMES
        net(inputs())
    assert names(routing) == NAMES * 2


@pytest.mark.parametrize("checkpointed", [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed")])
def test_compiled_model_records_and_gives_the_same_gradients(checkpointed, monkeypatch):
    torch.compiler.reset()
    if checkpointed:  # recording is a side effect, which the compiler refuses in a checkpoint without this setting
        monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    net, x = Net(checkpointed=checkpointed), inputs()
    expected, plain = train_step(net, net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads, routing = train_step(compiled, net, x)
    assert len(routing) == 3
    for (_, a), (_, b) in zip(routing, plain, strict=True):
        torch.testing.assert_close(a.gates, b.gates)
    assert grads.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], msg=name)

    compiled(x)
    assert len(routing) == 3  # the block has ended for compiled code too
    with record_routing(compiled) as again:
        compiled(x)
        compiled(x)
    assert len(again) == 6


@pytest.fixture
def one_process_group(tmp_path, monkeypatch):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    if not os.environ.get("GLOO_SOCKET_IFNAME") and os.path.exists("/sys/class/net/lo"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # for machines whose host name does not resolve
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointed", [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed")])
def test_distributed_data_parallel_records_and_gives_the_same_gradients(one_process_group, checkpointed):
    net, x = Net(checkpointed=checkpointed), inputs()
    expected, _ = train_step(net, net, x)
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    grads, routing = train_step(wrapped, net, x)
    assert names(routing) == [f"module.{name}" for name in NAMES]
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], msg=name)


def test_a_thread_records_its_own_calls_alone():
    net, x = Net(), inputs()
    both_open, both_ran = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def run(tokens: int) -> tuple[list[str], list[int]]:
        with record_routing(net) as routing:
            both_open.wait()
            net(x[:, :tokens])
            both_ran.wait()
        return names(routing), [info.gates.shape[1] for _, info in routing]

    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(run, (3, 5)))
    assert records == [(NAMES, [3] * 3), (NAMES, [5] * 3)]


def test_a_task_records_its_own_calls_alone():
    net, x = Net(), inputs()

    async def run(tokens: int) -> list[int]:
        with record_routing(net) as routing:
            await asyncio.sleep(0)
            net(x[:, :tokens])
            await asyncio.sleep(0)
        return [info.gates.shape[1] for _, info in routing]

    async def run_both() -> list[list[int]]:
        return await asyncio.gather(run(3), run(5))

    assert asyncio.run(run_both()) == [[3] * 3, [5] * 3]


def test_balance_losses_of_two_threads_on_one_model_are_those_of_each_alone():
    net, batches = Net(), [torch.randn(2, 6, C) for _ in range(16)]

    def loss(x: Tensor) -> float:
        with record_routing(net) as routing:
            net(x)
        return routing.balance_loss().item()

    alone = [loss(x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(loss, batches)) == pytest.approx(alone)


def test_a_task_that_outlives_the_block_is_not_recorded():
    net, x = Net(), inputs()

    async def run() -> int:
        async def later() -> None:
            await over.wait()
            net(x)

        over = asyncio.Event()
        with record_routing(net) as routing:
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        over.set()
        await task
        return len(routing)

    assert asyncio.run(run()) == 0
