"""Promises of the packing that backends share: active rows first, in token order, and back again."""

from __future__ import annotations

import pytest
import torch

from moh.attention.rows import pack, packed_rows_of, rows_of, token_major

SIZES = [
    pytest.param(2, 7, 4, 2, id="H4-kv2"),
    pytest.param(1, 5, 3, 3, id="H3-kv3"),
    pytest.param(2, 1, 6, 1, id="N1"),
]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("B, N, H, Hkv", SIZES)
def test_active_rows_come_first_in_token_order(B, N, H, Hkv, share):
    gates = (torch.rand(B, N, H) < share).float() * torch.randn(B, N, H)
    packed, G = pack(gates, Hkv), H // Hkv
    for b in range(B):
        for h in range(Hkv):
            active = [t * G + i for t in range(N) for i in range(G) if gates[b, t, h * G + i] != 0]
            assert packed.rows[b, h].tolist()[: len(active)] == active
            assert sorted(packed.rows[b, h].tolist()) == list(range(N * G))
            assert packed.counts[b, h] == len(active)
            assert packed.before[b, h].tolist() == [sum(row < t * G for row in active) for t in range(N + 1)]


@pytest.mark.parametrize("B, N, H, Hkv", SIZES)
def test_places_bring_rows_back_to_tokens_and_heads(B, N, H, Hkv):
    packed = pack((torch.rand(B, N, H) < 0.5).float(), Hkv)
    x = torch.randn(B, H, N, 3)
    front = rows_of(x, Hkv).gather(2, packed.rows[..., None].expand(-1, -1, -1, 3))
    back = front.gather(2, packed.places[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(token_major(back, N), x.transpose(1, 2))


def test_rows_that_are_not_live_are_0_whatever_they_hold():
    gates = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])  # [B, N, H], one key/value head
    packed = pack(gates, 1)
    x = torch.arange(6.0).view(1, 2, 3, 1).masked_fill(gates.transpose(1, 2)[..., None] == 0, torch.nan)  # [B, H, N, 1]
    live = torch.arange(4) < packed.counts[..., None]
    assert packed_rows_of(x, packed.rows[..., :4], live).flatten().tolist() == [0.0, 5.0, 0.0, 0.0]


def test_packing_has_static_shapes_and_asks_the_device_for_no_number():
    gates = torch.empty(2, 9, 4, device="meta")  # reading a number from it would be an error
    packed = pack(gates, 2)
    assert packed.rows.shape == packed.places.shape == (2, 2, 18)
    assert packed.counts.shape == (2, 2) and packed.before.shape == (2, 2, 10)
