"""Promises of the `flex` backend: its block mask, and values and gradients in FlexAttention's eager form.

FlexAttention refuses gradients on the CPU; the check is removed here, and its eager form computes them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from attention_cases import ACTIVITIES, MASKS, SPECIAL_MASKS, Inputs, attend, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moh.attention import BACKENDS, Call, choose_backend, flex, flex_block_counts, moh_attention
from moh.attention.flex import block_mask_of, blocks_of
from moh.attention.rows import pack
from moh.attention.testing import SHAPES, assert_same, compare

FLEX = BACKENDS["flex"]
causal_or_not = pytest.mark.parametrize("is_causal", [pytest.param(False, id="full"), pytest.param(True, id="causal")])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without compilation, on the CPU with gradients."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_module.flex_attention)


def attend_eagerly(inputs: Inputs) -> Tensor:
    if inputs.attn_mask is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
    return flex.attend(inputs.call)


@causal_or_not
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_are_served_like_the_reference(eager, shape, is_causal):
    compare(attend_eagerly, make_inputs(is_causal=is_causal, **shape))


@causal_or_not
@pytest.mark.parametrize("activity", ACTIVITIES)
def test_activities_are_served_like_the_reference(eager, activity, is_causal):
    compare(attend_eagerly, make_inputs(activity=activity, is_causal=is_causal))


@causal_or_not
@pytest.mark.parametrize("mask", MASKS)
def test_masks_over_several_blocks_are_served_like_the_reference(eager, mask, is_causal):
    compare(attend_eagerly, make_inputs(B=1, Hkv=2, Nq=150, Nk=140, mask=mask, activity="uneven", is_causal=is_causal))


@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mask", SPECIAL_MASKS)
def test_special_masks_are_served_like_the_reference(eager, mask, dtype, is_causal):
    kind = dict(Hkv=2, Nq=150, Nk=140, D=16, activity="uneven", is_causal=is_causal, dtype=dtype)
    inputs = make_inputs(mask=mask, **kind)
    if not mask.startswith("lowest"):
        compare(attend_eagerly, inputs)
        return
    # FlexAttention's backward pass has a log-sum-exp, which such rows leave no room for
    expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="reference", **inputs.options)
    assert_same(attend_eagerly(inputs), expected, "output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bits_are_served_like_the_reference(eager, dtype):
    compare(attend_eagerly, make_inputs(dtype=dtype, D=16, is_causal=True))


def visible(inputs: Inputs) -> Tensor:
    """Which packed row sees which key, bool `[B, Hkv, M, Nk]`, by the definition."""
    B, H, Nq, _ = inputs.q.shape
    Hkv, Nk = inputs.k.shape[1:3]
    seen = (inputs.gates != 0).transpose(1, 2)[..., None].expand(B, H, Nq, Nk)
    if inputs.is_causal:
        seen = seen & (torch.arange(Nq)[:, None] >= torch.arange(Nk))
    if inputs.attn_mask is not None:
        seen = seen & inputs.attn_mask
    rows = pack(inputs.gates, Hkv).rows
    by_row = seen.view(B, Hkv, H // Hkv, Nq, Nk).transpose(2, 3).reshape(B, Hkv, -1, Nk)
    return by_row.gather(2, rows[..., None].expand(-1, -1, -1, Nk))


@settings(max_examples=60)
@given(
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    G=st.integers(1, 3),
    Nq=st.integers(1, 20),
    Nk=st.integers(1, 20),
    activity=st.sampled_from(ACTIVITIES),
    mask=st.sampled_from([m for m in MASKS if not m.startswith("bias")]),
    is_causal=st.booleans(),
    block=st.sampled_from([2, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_every_needed_block_is_visited_and_whole_ones_need_no_mask(block, is_causal, **kind):
    inputs = make_inputs(is_causal=is_causal, D=1, **kind)
    Nk, G = inputs.k.shape[2], kind["G"]
    packed = pack(inputs.gates, kind["Hkv"])
    allowed = inputs.call.attn_mask
    needed, whole = blocks_of(packed, G, Nk, is_causal=is_causal, allowed=allowed, block=block)
    seen = visible(inputs)
    for index in needed.flatten().nonzero().flatten().tolist() + (~needed).flatten().nonzero().flatten().tolist():
        b, h, i, j = torch.unravel_index(torch.tensor(index), needed.shape)
        count = int(packed.counts[b, h])
        part = seen[b, h, i * block : min((i + 1) * block, count), j * block : (j + 1) * block]
        if part.any():
            assert needed[b, h, i, j]
        if whole[b, h, i, j]:
            assert needed[b, h, i, j] and part.all()
        if needed[b, h, i, j] and allowed is None:
            assert part.any()


def test_block_mask_lists_the_blocks_and_hides_what_the_tokens_may_not_see():
    inputs = make_inputs(B=2, Nq=40, is_causal=True, mask="padding")
    packed = pack(inputs.gates, 2)
    blocks = block_mask_of(packed, 2, 40, is_causal=True, attn_mask=inputs.attn_mask, block=16)
    seen = visible(inputs)
    b, h = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
    row, key = torch.arange(80)[:, None], torch.arange(40)
    got = blocks.mask_mod(b[..., None, None], h[..., None, None], row, key)
    live = torch.arange(80) < packed.counts[..., None]
    assert torch.equal(got & live[..., None], seen)
    dense = blocks.to_dense().bool()  # [B, Hkv, row blocks, key blocks]
    padded = torch.nn.functional.pad(seen, (0, 8)).view(2, 2, 5, 16, 3, 16)
    assert (dense | ~padded.any(-1).any(-2)).all()


def random_gates(N: int, H: int, share: float) -> Tensor:
    return torch.zeros(1, N, H).scatter(-1, torch.rand(1, N, H).topk(round(share * H)).indices, 1.0)


@pytest.mark.parametrize("Hkv", [8, 2])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@causal_or_not
def test_visited_blocks_approach_the_share_of_active_heads(share, Hkv, is_causal):
    shares = [
        flex_block_counts(random_gates(N, 8, share), Hkv, N, is_causal=is_causal).share for N in (512, 2048, 8192)
    ]
    assert shares == sorted(shares, reverse=True)
    assert share <= shares[-1] + 0.02 and shares[-1] <= share + 0.04


def test_blocks_of_other_documents_and_of_padding_are_not_visited():
    N = 1024
    document = torch.arange(N) // 256
    same = document[:, None] == document
    counts = flex_block_counts(random_gates(N, 4, 0.5), 4, N, is_causal=True, attn_mask=same)
    alone = flex_block_counts(random_gates(N, 4, 0.5), 4, N, is_causal=True)
    assert counts.visited < 0.6 * alone.visited
    padded = flex_block_counts(torch.ones(1, N, 4), 4, N, attn_mask=(torch.arange(N) < 256)[None, None, None])
    assert padded.visited == 4 * 8 * 2


def test_nothing_active_visits_nothing():
    assert flex_block_counts(torch.zeros(1, 300, 4), 2, 300).visited == 0


def test_it_serves_no_gradients_on_the_cpu_and_is_not_chosen_there():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="backend 'flex' can't handle this call: FlexAttention has no gradients"):
        moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="flex")
    double = inputs.q.detach().double()
    assert choose_backend(Call(double, double, double, inputs.gates.detach().double())).name != "flex"


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "blind_rows"])
def test_the_compiled_forward_pass_of_the_cpu_has_the_values_of_the_reference(mask):
    inputs = make_inputs(B=1, Nq=150, D=16, is_causal=True, mask=mask, activity="uneven")
    with torch.no_grad():
        inputs.q, inputs.k, inputs.v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
        got = attend(FLEX, inputs)
        expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="reference", **inputs.options)
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_one_graph_holds_a_whole_call():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    inputs = make_inputs(B=1, Nq=20, D=16, is_causal=True)
    tensors = [x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.gates)]
    run = torch.compile(lambda *x: moh_attention(*x, is_causal=True, backend="flex"), backend=counter, fullgraph=True)
    with torch.no_grad():
        got = run(*tensors)
    assert counter.frame_count == 1
    torch.testing.assert_close(got, moh_attention(*tensors, is_causal=True, backend="reference"))
