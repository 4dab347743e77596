"""Promises of the packing that backends share: active rows first, in token order, and back again."""

from __future__ import annotations

import pytest
import torch

from moh.attention.rows import pack, rows_of, token_major

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


def test_packing_has_static_shapes_and_asks_the_device_for_no_number():
    gates = torch.empty(2, 9, 4, device="meta")  # a number asked of it would be an error
    packed = pack(gates, 2)
    assert packed.rows.shape == packed.places.shape == (2, 2, 18)
    assert packed.counts.shape == (2, 2) and packed.before.shape == (2, 2, 10)
