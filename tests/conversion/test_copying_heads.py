"""Promise: a head that copies from afar, and that its router would leave out where it does, is shared (docs/method.md, M21)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moh import MoHConfig, convert
from moh.conversion import calibrator as calibrator_module
from moh.conversion import copying
from moh.conversion.calibrator import Calibrator
from moh.conversion.copying import COPIES, COPY_START, COPY_TOKENS, least_loss, with_copies
from moh.conversion.passes import losses_at
from moh.conversion.transformers import DenseTextModel
from moh.routing import LinearRouter, Router

SIZES = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)


@pytest.fixture
def long_tokens() -> Tensor:
    return torch.randint(64, (4, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that fit blocks of 96 tokens, and heads of a random model count as copying."""
    for name, value in dict(COPIES=2, COPY_TOKENS=12, COPY_START=2, COPY_LOSSES=((0.5, 1e-6),)).items():
        monkeypatch.setattr(copying, name, value)
    monkeypatch.setattr(calibrator_module, "COPY_LENGTH", 96)


def test_copies_repeat_the_beginning_and_their_places_are_foretold() -> None:
    ids = torch.arange(2 * 2048).view(2, -1)
    copied, places = with_copies(ids)
    end = COPIES * COPY_TOKENS
    assert torch.equal(copied[:, :-end], ids[:, :-end]) and copied.shape == ids.shape
    assert copied[0, -end:].max() < 512 and len(copied[0, -end:].unique()) == end  # each part once
    assert len(places) == COPIES * (COPY_TOKENS - COPY_START)
    for row in copied:
        for place in places.tolist():
            before = row[place - COPY_START + 1 : place + 2].tolist()
            assert row[: 512 + COPY_TOKENS].tolist().count(before[0]) == 1
            first = row.tolist().index(before[0])
            assert row[first : first + len(before)].tolist() == before


def test_of_fewer_heads_each_has_to_be_worth_more_to_be_shared() -> None:
    bounds = [least_loss(share) for share in (1.0, 7 / 9, 6 / 9, 5 / 9, 0.5, 4 / 9)]
    shared = [bound for bound in bounds if bound is not None]
    assert shared == sorted(shared) and shared[0] < shared[-1] and bounds[-1] is None and len(shared) == 5


def weighted(dense: nn.Module, layer: int, head: int, places: Tensor, weight: float) -> Any:
    """The handle of a hook that multiplies one head's output at some places."""

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (4, -1)).clone()
        heads[:, places, head] *= weight
        return (heads.flatten(2),)

    return dense.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(multiply)


@torch.no_grad()
def loss_of(dense: nn.Module, ids: Tensor, places: Tensor) -> float:
    """As the adapter's, but in float64."""
    return float(nn.functional.cross_entropy(dense(ids[None]).logits[0, places], ids[places + 1], reduction="sum"))


def test_losses_are_those_of_leaving_a_head_out_to_first_order(make_dense, long_tokens: Tensor) -> None:
    dense = make_dense(**SIZES).double()
    adapter = DenseTextModel(dense, "linear", copied=False)
    routers: list[Router] = [LinearRouter(MoHConfig(4, (layer,), 1, "linear"), 32) for layer in range(3)]
    places = torch.tensor([40, 41, 77])
    (got,) = losses_at(adapter, [routers], iter(long_tokens.split(2)), places)
    assert got.shape == (3, 4) and (got.abs() > 0).any()
    step = 0.01  # norms are in float32
    for layer in range(3):
        assert got[layer, layer] == 0  # shared: never left out
        inputs: list[Tensor] = []
        norm = dense.model.layers[layer].input_layernorm.register_forward_hook(
            lambda m, a, out, seen=inputs: seen.append(out)
        )
        adapter.loss(long_tokens)
        norm.remove()
        out = routers[layer](inputs[0][:, places].float()).gates == 0  # [B, P, H]
        for head in range(4):
            expected = 0.0
            for p, place in enumerate(places.tolist()):
                for row in out[:, p, head].nonzero().flatten().tolist():
                    losses = []
                    for weight in (1 - step, 1 + step):
                        handle = weighted(dense, layer, head, torch.tensor([place]), weight)
                        losses.append(loss_of(dense, long_tokens[row], places))
                        handle.remove()
                    expected += (losses[0] - losses[1]) / (2 * step)
            assert float(got[layer, head]) == pytest.approx(expected / (4 * len(places)), rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("router", ["threshold", "linear"])
@pytest.mark.usefixtures("_small")
def test_heads_that_would_be_missed_are_shared_and_a_layer_keeps_its_number(
    make_dense, long_tokens: Tensor, router
) -> None:
    adapter = DenseTextModel(make_dense(**SIZES), router, copied=False)
    calibrator = Calibrator(adapter, [long_tokens[:, :32], long_tokens], 2, progress=False)
    before = calibrator.fit_routers([MoHConfig(4, 1, 1, router)] * 3, refitted=True)
    after = calibrator.share_copying_heads(before)
    (losses,) = calibrator._copy_losses.values()
    added = 0
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        copying = set(new.config.shared_indices) - set(old.config.shared_indices)
        assert set(new.config.shared_indices) >= set(old.config.shared_indices)
        assert new.config.num_shared + new.config.active_heads == 2
        assert len(copying) <= 1 and all(losses[2, layer, head] > 1e-6 for head in copying)
        assert copying or not (losses[2, layer] > 1e-6).any()
        added += len(copying)
        if router == "threshold" and copying:
            assert new.config.thresholds is not None and len(new.config.thresholds) == new.config.num_routed + 1
    assert added  # or this test shows nothing
    again = calibrator.share_copying_heads(before)  # by the same pass
    assert len(calibrator._copy_losses) == 1
    assert [r.config for r in again] == [r.config for r in after]


@pytest.mark.usefixtures("_small")
def test_short_blocks_and_heads_that_are_asked_for_stay_as_they_are(make_dense, long_tokens: Tensor) -> None:
    dense = make_dense(**SIZES)
    calibrator = Calibrator(DenseTextModel(dense, "threshold", copied=False), long_tokens[:, :95], 2, progress=False)
    routers = calibrator.fit_routers([MoHConfig(4, 1, 1, "threshold")] * 3)
    assert all(new is old for new, old in zip(calibrator.share_copying_heads(routers), routers, strict=True))
    few = calibrator_module.Calibrator(calibrator.dense, long_tokens, 2, progress=False)
    routers = few.fit_routers([MoHConfig(4, 1, 0, "threshold")] * 3)  # a quarter of the heads
    assert all(new is old for new, old in zip(few.share_copying_heads(routers), routers, strict=True))
    options = dict(calibration=long_tokens, progress=False)
    asked = convert(dense, shared_heads=1, active_heads=1, **options).config.layer_configs()
    assert all(layer.num_shared == 1 for layer in asked)
    default = convert(dense, share=0.5, **options).config.layer_configs()
    assert any(layer.num_shared > 1 for layer in default)
    assert sum(layer.num_shared + layer.active_heads for layer in default) == 6
