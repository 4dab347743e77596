"""The balance loss over all processes and its averaged gradient are those of one process with all the tokens."""

from __future__ import annotations

import pytest
import torch

import moh


@pytest.mark.parametrize(
    ("router", "inside", "checkpointed"),
    [
        pytest.param("two_stage", False, False, id="group_given"),
        pytest.param("query_norm", True, True, id="inside_the_block_with_checkpointing"),
    ],
)
def test_two_processes_have_the_balance_loss_and_gradient_of_one(team, router, inside, checkpointed) -> None:
    arguments = {"router": router, "inside": inside, "checkpointed": checkpointed}
    ((expected, gradients),) = team("balance", 1, **arguments)
    for loss, averaged in team("balance", 2, **arguments):
        torch.testing.assert_close(loss, expected)
        assert averaged.keys() == gradients.keys()
        for name in averaged:
            torch.testing.assert_close(averaged[name], gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def assert_same(got, expected) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind, extra", [("timm", "timm"), ("dit", "diffusers")])
def test_a_bare_loop_under_ddp_has_the_balance_loss_of_its_model(team, kind, extra) -> None:
    pytest.importorskip(extra)
    expected = team("attached_balance", 2, kind=kind, attached=False)
    for got in team("attached_balance", 2, kind=kind, attached=True):
        assert_same(got, expected[0])


def test_a_trainers_own_loss_weights_the_balance_loss_by_labels_over_all_processes(team) -> None:
    """With `average_tokens_across_devices`, the default; docs/language.md says what happens without."""
    pytest.importorskip("transformers")
    (expected,) = team("foreign_loss", 1, average=True, by_hand=True)
    for processes in (1, 2):
        for got in team("foreign_loss", processes, average=True, by_hand=False):
            assert_same(got, expected)


def test_without_other_processes_the_block_changes_nothing() -> None:
    layer, x = moh.MoHAttention(16, 4, shared_heads=1, active_heads=2), torch.randn(2, 5, 16)
    with moh.record_routing(layer) as routing:
        layer(x)
    with moh.balance_over_processes():
        assert routing.balance_loss().equal(routing.layers[0][1].balance_loss())


def test_sums_over_parts_of_a_batch_give_its_balance_loss() -> None:
    layer, x = moh.MoHAttention(16, 4, shared_heads=1, active_heads=2), torch.randn(3, 5, 16)
    mask = torch.rand(3, 5) > 0.3
    with moh.record_routing(layer) as routing:
        layer(x)
        layer(x[:1])
        layer(x[1:])
    (_, whole), (_, first), (_, rest) = routing
    active, probs, count = (
        a + b for a, b in zip(first.balance_sums(mask[:1]), rest.balance_sums(mask[1:]), strict=True)
    )
    torch.testing.assert_close(3 * (active / count * probs / count).sum(), whole.balance_loss(mask))
