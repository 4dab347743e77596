"""Promises of `MoHAttention`: ordinary attention if every head is active, otherwise that of the active heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moh
from moh import MoHAttention

B, N, C, H = 2, 7, 24, 6


def all_heads(**options) -> MoHAttention:
    """A layer with every head shared and gates of 1."""
    return MoHAttention(C, H, shared_heads=H, active_heads=0, **{"router": "linear"} | options)


def ordinary(layer: MoHAttention, x: Tensor, context: Tensor | None = None, **options) -> Tensor:
    """Multi-head attention with the layer's weights, by PyTorch's own function."""
    context = x if context is None else context

    def heads(projection: torch.nn.Linear, source: Tensor) -> Tensor:
        return projection(source).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    q, k, v = heads(layer.q_proj, x), heads(layer.k_proj, context), heads(layer.v_proj, context)
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return layer.proj(out.transpose(1, 2).flatten(2))


def assert_equals_ordinary(layer: MoHAttention, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(expected)
    parameters = [p for name, p in layer.named_parameters() if "router" not in name]
    got_grads = torch.autograd.grad((got * weight).sum(), parameters)
    expected_grads = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("is_causal", [pytest.param(False, id="full"), pytest.param(True, id="causal")])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(dict(num_kv_heads=2), id="grouped-query"),
        pytest.param(dict(num_kv_heads=1), id="multi-query"),
        pytest.param(dict(head_dim=5), id="heads-wider-than-the-model"),
        pytest.param(dict(qkv_bias=True, proj_bias=False), id="biases"),
        pytest.param(dict(backend="reference"), id="reference"),
    ],
)
def test_all_heads_active_is_ordinary_attention(router, is_causal, options):
    layer, x = all_heads(router=router, **options), torch.randn(B, N, C)
    got = layer(x, is_causal=is_causal)
    assert_equals_ordinary(layer, got, ordinary(layer, x, is_causal=is_causal))


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_all_heads_routed_and_active_is_ordinary_attention(router):
    layer, x = MoHAttention(C, H, shared_heads=0, active_heads=H, router=router), torch.randn(B, N, C)
    torch.testing.assert_close(layer(x), ordinary(layer, x))


def test_cross_attention_reads_keys_and_values_from_the_context():
    layer = all_heads(context_dim=10, num_kv_heads=3)
    x, context = torch.randn(B, N, C), torch.randn(B, 4, 10)
    assert_equals_ordinary(layer, layer(x, context), ordinary(layer, x, context))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_mask_is_ordinary(kind):
    layer, x = all_heads(), torch.randn(B, N, C)
    mask = torch.rand(B, 1, N, N) < 0.7 if kind == "bool" else torch.randn(H, N, N)
    assert_equals_ordinary(layer, layer(x, attn_mask=mask), ordinary(layer, x, attn_mask=mask))


@pytest.mark.parametrize("attn_mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("is_causal", [pytest.param(False, id="full"), pytest.param(True, id="causal")])
def test_padding_is_not_seen(attn_mask, is_causal):
    layer = MoHAttention(C, H, shared_heads=1, active_heads=2)
    x = torch.randn(1, N, C)
    mask = {"none": None, "bool": torch.rand(N, N) < 0.8, "additive": torch.randn(N, N)}[attn_mask]
    if attn_mask == "bool":
        mask.fill_diagonal_(True)
    short = layer(x[:, :5], attn_mask=None if mask is None else mask[:5, :5], is_causal=is_causal)
    real = torch.tensor([[True] * 5 + [False] * 2])
    padded = layer(x, attn_mask=mask, key_padding_mask=real, is_causal=is_causal)
    torch.testing.assert_close(padded[:, :5], short)
    assert not torch.allclose(layer(x, attn_mask=mask)[:, :5], short)


def test_padding_of_the_context_is_not_seen():
    layer = MoHAttention(C, H, shared_heads=1, active_heads=2)
    x, context = torch.randn(1, N, C), torch.randn(1, 4, C)
    padded = torch.cat([torch.randn(1, 2, C), context], dim=1)  # on the left
    real = torch.tensor([[False, False, True, True, True, True]])
    torch.testing.assert_close(layer(x, padded, key_padding_mask=real), layer(x, context))


@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
@pytest.mark.parametrize("shared", [pytest.param(2, id="first-2-shared"), pytest.param([1, 5], id="1-and-5-shared")])
def test_output_is_the_sum_of_the_active_heads_times_their_gates(router, shared):
    layer = MoHAttention(C, H, shared_heads=shared, active_heads=2, router=router, num_kv_heads=3)
    x = torch.randn(B, N, C)
    got, routing = layer(x, return_routing=True)
    expected = layer.proj.bias.expand(B, N, C)
    D = layer.head_dim
    for i in range(H):
        q = layer.q_proj(x)[..., i * D : (i + 1) * D]
        j = i // 2  # of the 3 key/value heads
        k, v = (p(x)[..., j * D : (j + 1) * D] for p in (layer.k_proj, layer.v_proj))
        head = F.scaled_dot_product_attention(q, k, v) @ layer.proj.weight[:, i * D : (i + 1) * D].T
        expected = expected + routing.gates[..., i, None] * head
    torch.testing.assert_close(got, expected)
    assert (routing.active.sum(-1) == 4).all()
    assert routing.config == layer.config


@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
def test_every_parameter_learns(router):
    layer = MoHAttention(C, H, shared_heads=2, active_heads=2, router=router, qkv_bias=True)
    layer(torch.randn(B, N, C)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        # the keys' bias adds a constant to all of a query's scores, which softmax cancels
        assert name == "k_proj.bias" or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["attn_drop", "proj_drop"])
def test_dropout_only_in_training(kind):
    layer, x = MoHAttention(C, H, shared_heads=2, active_heads=2, **{kind: 0.5}), torch.randn(B, N, C)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    plain = MoHAttention(C, H, shared_heads=2, active_heads=2)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
def test_state_dict_round_trip(tmp_path, router):
    def make() -> MoHAttention:
        return MoHAttention(C, H, shared_heads=[0, 3], active_heads=2, router=router, num_kv_heads=2)

    layer, other, x = make(), make(), torch.randn(B, N, C)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_meta_device_and_dtype_are_passed_on():
    layer = MoHAttention(C, H, shared_heads=2, active_heads=2, device=torch.device("meta"), dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert layer(torch.randn(B, N, C, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_runs_a_float32_layer_in_bfloat16():
    layer, x = MoHAttention(C, H, shared_heads=2, active_heads=2), torch.randn(B, N, C)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.router.routed.weight.grad.dtype == torch.float32


def test_one_token_and_no_sequence_work():
    layer = MoHAttention(C, H, shared_heads=2, active_heads=2)
    assert layer(torch.randn(1, 1, C)).shape == (1, 1, C)
    assert layer(torch.randn(0, N, C)).shape == (0, N, C)


def test_repr_tells_the_heads():
    assert "heads=6, shared=[0, 1], active=2, share=0.67" in repr(MoHAttention(C, H, shared_heads=2, active_heads=2))


@pytest.mark.parametrize("router", ["two_stage", "linear"])
@pytest.mark.parametrize("options", [{}, dict(qk_norm=True, num_kv_heads=2), dict(window=3)], ids=str)
@pytest.mark.parametrize("steps", [[1] * N, [4, 1, 1, 1], [2, 3, 2], [N]], ids=str)
def test_a_cache_continues_the_text(router, options, steps):
    layer = MoHAttention(C, H, shared_heads=1, active_heads=2, router=router, **options)
    rotate, cache = moh.RotaryEmbedding(layer.head_dim), moh.KVCache(N)
    x = torch.randn(B, N, C)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, rotate=rotate, cache=cache) for part in x.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, is_causal=True, rotate=rotate))
    assert cache.length == N
    with torch.no_grad(), pytest.raises(ValueError, match=f"holds max_length = {N} tokens, got {N + 1}"):
        layer(x[:, :1], is_causal=True, cache=cache)


def test_a_cache_with_padding_on_the_left_is_the_text_without_it():
    layer, cache = MoHAttention(C, H, shared_heads=1, active_heads=2), moh.KVCache(N)
    x, real = torch.randn(1, N, C), torch.tensor([[False, False] + [True] * (N - 2)])
    with torch.no_grad():
        parts = [
            layer(x[:, a:b], is_causal=True, cache=cache, key_padding_mask=real[:, :b])
            for a, b in ((0, 5), (5, 6), (6, N))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1)[:, 2:], layer(x[:, 2:], is_causal=True))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_window_is_a_band_mask(kind):
    layer, x = all_heads(window=3), torch.randn(B, N, C)
    band = torch.ones(N, N, dtype=torch.bool).tril().triu(-2)
    extra = torch.rand(N, N) < 0.7 if kind == "bool" else torch.randn(N, N)
    if kind == "bool":
        extra.fill_diagonal_(True)
    both = band & extra if kind == "bool" else extra.masked_fill(~band, -torch.inf)
    assert_equals_ordinary(layer, layer(x, is_causal=True), ordinary(layer, x, attn_mask=band))
    assert_equals_ordinary(layer, layer(x, is_causal=True, attn_mask=extra), ordinary(layer, x, attn_mask=both))


def test_rotary_embedding_is_that_of_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotate, q, start = moh.RotaryEmbedding(8, base=500.0), torch.randn(B, H, N, 8), 5
    angles = torch.outer(torch.arange(start, start + N).float(), 500.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    expected, _ = apply_rotary_pos_emb(q, q, angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(rotate(q, start), expected)
    with pytest.raises(ValueError, match="head_dim must be even and at least 2, got 5"):
        moh.RotaryEmbedding(5)


def test_rotation_makes_scores_depend_on_the_distance_alone():
    rotate, q, k = moh.RotaryEmbedding(8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(rotate(q, start + 3) * rotate(k, start)).sum() for start in (0, 11, 100)]
    torch.testing.assert_close(scores[1:], scores[:1] * 2, rtol=1e-4, atol=1e-5)


def test_query_and_key_norms():
    layer, x = all_heads(qk_norm=True, num_kv_heads=2), torch.randn(B, N, C)
    torch.nn.init.uniform_(layer.q_norm.weight)
    q = layer.q_norm(layer.q_proj(x).unflatten(-1, (H, -1))).transpose(1, 2)
    k = layer.k_norm(layer.k_proj(x).unflatten(-1, (2, -1))).transpose(1, 2)
    v = layer.v_proj(x).unflatten(-1, (2, -1)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, is_causal=True, rotate=moh.RotaryEmbedding(layer.head_dim)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"qk_norm .* router='query_norm'"):
        all_heads(qk_norm=True, router="query_norm")


def test_arguments_of_self_attention_alone_are_refused_elsewhere():
    layer, x = all_heads(), torch.randn(B, N, C)
    for options in (dict(cache=moh.KVCache(N)), dict(rotate=moh.RotaryEmbedding(4))):
        with pytest.raises(ValueError, match="context must be None"):
            layer(x, x, **options)
    with pytest.raises(ValueError, match=r"is_causal must be True .* window=3"):
        all_heads(window=3)(x)
    cache = moh.KVCache(N)
    with torch.no_grad():
        layer(x[:, :2], is_causal=True, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"\[2, 6, 4\] of torch.float32, got \[1, 6, 4\]"):
        layer(x[:1, :1], is_causal=True, cache=cache)
    for other in (torch.zeros(B, H, 1, 5), torch.zeros(B, H, 1, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="make a new one"):
            cache.update(other, other)
    assert cache.length == 2


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(
            dict(dim=25), "dim must be a multiple of num_heads = 6 unless head_dim is given, got 25", id="dim"
        ),
        pytest.param(dict(num_kv_heads=4), "num_kv_heads must divide num_heads = 6, got 4", id="kv-heads"),
        *(
            pytest.param({name: value}, f"{name} must be an integer of at least 1, got {value}", id=f"{name}-{value}")
            for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "context_dim")
            for value in (0, -1, 2.0)
        ),
        pytest.param(dict(active_heads=3.0), "active_heads must be an integer, got 3.0", id="float"),
        pytest.param(
            dict(shared_heads=5, active_heads=2),
            "active_heads must be between 0 and .* = 1, got 2",
            id="heads",
        ),
        pytest.param(dict(shared_heads=0, active_heads=0), "active_heads must be at least 1", id="no-heads"),
        pytest.param(dict(router="best"), "router must be one of .*got 'best'", id="router"),
        pytest.param(dict(window=0), "window must be at least 1 or None, got 0", id="window"),
        pytest.param(dict(attn_drop=1.0), "attn_drop must be at least 0 and below 1, got 1.0", id="attn-drop"),
        pytest.param(dict(proj_drop=-0.5), "-0.5", id="proj-drop"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoHAttention(**dict(dim=C, num_heads=H, shared_heads=2, active_heads=2) | options)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.ones(B, N), id="float"),
        pytest.param(torch.ones(B, N + 1, dtype=torch.bool), id="too-long"),
        pytest.param(torch.ones(N, dtype=torch.bool), id="1d"),
    ],
)
def test_wrong_padding_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool of shape \[B, Nk\] = \(2, 7\), got torch"):
        all_heads()(torch.randn(B, N, C), key_padding_mask=mask)


def test_unknown_backend_is_refused():
    layer = MoHAttention(C, H, shared_heads=2, active_heads=2, backend="fastest")
    with pytest.raises(ValueError, match="backend must be None or one of"):
        layer(torch.randn(B, N, C))


def test_compiled_layer_is_one_graph_and_equals_eager():
    torch.compiler.reset()
    layer, x = MoHAttention(C, H, shared_heads=2, active_heads=2, num_kv_heads=3), torch.randn(B, N, C)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def outcome(function) -> list[Tensor]:
        out, routing = function(x, is_causal=True, return_routing=True)
        loss = out.square().sum() + routing.balance_loss()
        return [out, routing.gates, *torch.autograd.grad(loss, list(layer.parameters()))]

    for got, expected in zip(outcome(compiled), outcome(layer), strict=True):
        torch.testing.assert_close(got, expected)


def test_public_names_are_there():
    assert moh.MoHAttention is MoHAttention


@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize(
    "unit, shared, active", [("group_balanced", 0, 3), ("group_balanced", 3, 0), ("kv_group", 2, 2), ("kv_group", 0, 4)]
)
def test_groups_of_heads_are_chosen_as_the_reference_has_it(unit, shared, active, backend):
    heads = dict(shared_heads=shared, active_heads=active, routing_unit=unit, num_kv_heads=3)
    layer, x = MoHAttention(C, H, **heads, backend=backend), torch.randn(B, N, C)
    reference = MoHAttention(C, H, **heads, backend="reference")
    reference.load_state_dict(layer.state_dict())
    out, routing = layer(x, is_causal=True, return_routing=True)
    expected = reference(x, is_causal=True)
    torch.testing.assert_close(out, expected)
    used = routing.active.unflatten(-1, (3, 2)).sum(-1)
    assert (used == 1).all() if unit == "group_balanced" else set(used.unique().tolist()) == {0, 2}
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), list(layer.parameters()), allow_unused=True),
        torch.autograd.grad(expected.square().sum(), list(reference.parameters()), allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_group_balanced_layer_compiles_to_one_graph_on_pytorchs_own_attention():
    torch.compiler.reset()
    layer = MoHAttention(
        C, H, shared_heads=0, active_heads=3, routing_unit="group_balanced", num_kv_heads=3, backend="grouped"
    )
    x = torch.randn(B, N, C)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, is_causal=True), layer(x, is_causal=True))


def test_units_without_grouped_queries_choose_single_heads_or_all():
    layer = MoHAttention(C, H, shared_heads=0, active_heads=2, routing_unit="kv_group")  # every group is one head
    assert (layer(torch.randn(B, N, C), return_routing=True)[1].active.sum(-1) == 2).all()
    with pytest.raises(ValueError, match="active_heads must be a multiple of kv_heads = 6"):
        MoHAttention(C, H, shared_heads=0, active_heads=2, routing_unit="group_balanced")


def test_a_cache_is_refused_where_autograd_records():
    layer, x = MoHAttention(C, H, shared_heads=2, active_heads=2), torch.randn(B, N, C)
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        layer(x, is_causal=True, cache=moh.KVCache(N))
