"""Promises of routing and of whole layers by one operator: the definition's numbers, and only where nobody sees the steps."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ISAS
from covering import covering
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moh
from moh import MoHConfig
from moh.attention import route
from moh.routing import TwoStageRouter, build_router

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
UNITS = [("head", None), ("group_balanced", 4), ("kv_group", 4)]
CONFIGS = [
    pytest.param(MoHConfig(8, shared, active, router, unit, groups), id=f"{router}-{unit}-{shared}-shared-{active}-active")
    for router in ("two_stage", "single_stage", "linear")
    for unit, groups in UNITS
    for shared, active in ((0, 4), (4, 4), (0, 8), (4, 0))
] + [
    pytest.param(MoHConfig(8, [2, 7], 3, "two_stage"), id="shared-2-and-7"),
    pytest.param(MoHConfig(8, [2, 7], 3, "linear"), id="linear-shared-2-and-7"),
    pytest.param(MoHConfig(40, 3, 20, "two_stage"), id="more-outputs-than-lanes"),
    pytest.param(MoHConfig(8, 1, 3, "threshold", thresholds=[9, 0.5, 0.3, 0, -0.1, -0.5, -1, -9]), id="threshold"),
    pytest.param(MoHConfig(8, 1, 7, "threshold", thresholds=[9, 0.5, 0.3, 0, -0.1, -0.5, -1, 9]), id="threshold-of-all"),
    pytest.param(MoHConfig(8, 1, 0, "threshold", thresholds=[-9, 0.5, 0.3, 0, -0.1, -0.5, -1, 9]), id="threshold-of-none"),
]  # fmt: skip


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_close(got, expected, dtype):
    allowed = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


def routers_input(config: MoHConfig, dtype: torch.dtype, C: int = 50, tokens: int = 70):
    torch.manual_seed(0)
    router = build_router(config, C)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    return router.to(dtype).eval(), torch.randn(2, tokens, C).to(dtype)


def operators(run) -> set[str]:
    """The operators of this package that a call runs."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return {event.name for event in profile.function_events if event.name.startswith("moh::")}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_routing_is_the_routers(isa, config, dtype):
    router, x = routers_input(config, dtype)
    expected, got = router(x), route(router, x)
    assert got.config is config and (got.probs is None) == (expected.probs is None)
    assert got.gates.dtype == dtype and got.gates.shape == expected.gates.shape
    same = (got.active == expected.active).all(-1)
    # in 16 bits many scores are equal, and of these `topk` takes any
    assert same.all() if dtype == torch.float32 else same.float().mean() > 0.9
    if config.router != "threshold":
        assert torch.equal(got.active.sum(-1), expected.active.sum(-1))
    assert_close(got.gates[same], expected.gates[same], dtype)
    if expected.probs is not None:
        assert_close(got.probs, expected.probs, dtype)
        assert_close(got.balance_loss(), expected.balance_loss(), dtype)


@torch.no_grad()
@pytest.mark.parametrize("router", ["two_stage", "linear"])
def test_numbers_that_are_not_finite_are_seen_in_the_gates_as_by_the_router(router):
    router, x = routers_input(MoHConfig(8, 2, 3, router), torch.float32)
    x[0, 3, 5], x[1, 7, 0] = float("nan"), float("inf")
    expected, got = router(x), route(router, x)
    assert torch.equal(got.gates.isnan(), expected.gates.isnan())
    finite = torch.ones(2, 70, dtype=torch.bool)
    finite[0, 3] = finite[1, 7] = False
    assert_close(got.gates[finite], expected.gates[finite], torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_bits_do_not_depend_on_the_number_of_threads(isa, threads, dtype):
    layer = moh.MoHAttention(512, 8, shared_heads=2, active_heads=2, qkv_bias=True).to(dtype).eval()
    x = torch.randn(2, 300, 512).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        out, routing = layer(x, return_routing=True)
        results.append((out, routing.gates, routing.probs))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def layer_of(sizes: dict[str, object], dtype: torch.dtype) -> moh.MoHAttention:
    torch.manual_seed(0)
    heads = dict(dim=96, num_heads=4, shared_heads=1, active_heads=1, qkv_bias=True) | sizes
    return moh.MoHAttention(**heads).to(dtype).eval()


@covering(
    3,
    indirect=["isa"],
    isa=ISAS,
    dtype=DTYPES,
    layer=[
        pytest.param(({}, (2, 70)), id="half-of-the-heads"),
        pytest.param(({"active_heads": 3}, (2, 70)), id="all-heads"),
        pytest.param(({"num_kv_heads": 2}, (2, 70)), id="grouped"),
        pytest.param(({"qkv_bias": False, "proj_bias": False}, (2, 70)), id="no-biases"),
        pytest.param(({"head_dim": 72, "dim": 60}, (2, 70)), id="heads-of-72"),
        pytest.param(({"router": "linear"}, (2, 40)), id="few-tokens"),
        pytest.param(({"shared_heads": 0, "router": "linear"}, (2, 1)), id="one-token"),
        pytest.param(({"shared_heads": 0}, (80, 1)), id="one-token-of-many-texts"),
    ],
    is_causal=[pytest.param(False, id="all-keys"), pytest.param(True, id="causal")],
)
def test_a_whole_layer_gives_what_its_steps_give(isa, layer, is_causal, dtype):
    sizes, shape = layer
    layer = layer_of(sizes, dtype)
    x = torch.randn(*shape, layer.dim).to(dtype)
    expected, routing = layer(x, is_causal=is_causal, return_routing=True)
    with torch.no_grad():
        assert operators(lambda: layer(x)) >= {"moh::cpu_route", "moh::cpu_layer"}
        got, routed = layer(x, is_causal=is_causal, return_routing=True)
    # Keys and values of a token don't depend on its heads, so that each token can be compared for itself.
    same = (routed.active == routing.active).all(-1)
    assert same.all() if dtype == torch.float32 else same.float().mean() > 0.9
    assert_close(got[same], expected[same].detach(), dtype)


@pytest.mark.parametrize("active", [1, 2, 3], ids=lambda k: f"{k}-of-3")
def test_a_vision_transformer_gives_what_its_steps_give(isa, active):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3)
    model = timm.create_model(
        "moh_vit", base="vit_tiny_patch16_224", **sizes, shared_heads=0, active_heads=active
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).detach()
    with torch.no_grad():
        assert "moh::cpu_layer" in operators(lambda: model(images))
        assert_close(model(images), expected, torch.float32)


class Reversed(TwoStageRouter):
    def _route(self, source):
        return super()._route(source.flip(-1))


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0


def autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)


def with_gradients(layer, x):
    with torch.enable_grad():
        assert layer(x).requires_grad


def compiled(layer, x):
    torch.compile(layer, backend="eager", fullgraph=True)(x)


def exported(layer, x):
    torch.export.export(layer, (x,)).module()(x)


class Adapter(nn.Linear):
    """In place of an adapter library's: a linear layer of another class."""


class Quantised(nn.Parameter):
    """In place of a quantiser's: a weight of another class."""


def with_adapter(layer, x):
    layer.proj.__class__ = Adapter
    layer(x)


def with_quantised_weight(layer, x):
    layer.q_proj.weight = Quantised(layer.q_proj.weight)
    layer(x)


def with_global_hook(layer, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert {layer.router.routed, layer.q_proj, layer.proj} <= set(seen)


NEITHER = {
    "gradients": ({}, with_gradients),
    "operations-are-counted": ({}, counted),
    "autocast": ({}, autocast),
    "vmap": ({}, lambda layer, x: torch.vmap(lambda one: layer(one[None])[0])(x)),
    "another-backend": ({"backend": "sdpa"}, lambda layer, x: layer(x)),
    "compiled": ({}, compiled),
    "exported": ({}, exported),
    "hooks-on-all-modules": ({}, with_global_hook),
}
ROUTE_ALONE = {
    "norms-of-queries": ({"qk_norm": True}, lambda layer, x: layer(x)),
    "mask": ({}, lambda layer, x: layer(x, attn_mask=torch.ones(70, 70, dtype=torch.bool))),
    "padding": ({}, lambda layer, x: layer(x, key_padding_mask=torch.ones(2, 70, dtype=torch.bool))),
    "context": ({}, lambda layer, x: layer(x, x.flip(1))),
    "positions": ({}, lambda layer, x: layer(x, rotate=moh.RotaryEmbedding(layer.head_dim))),
    "cache": ({}, lambda layer, x: layer(x, cache=moh.KVCache(70))),
    "window": ({"window": 3}, lambda layer, x: layer(x, is_causal=True)),
    "adapter": ({}, with_adapter),
    "quantised-weight": ({}, with_quantised_weight),
}


@torch.no_grad()
@pytest.mark.parametrize("case", [*NEITHER, *ROUTE_ALONE])
def test_the_steps_run_one_by_one_where_something_needs_them(case):
    sizes, run = (NEITHER | ROUTE_ALONE)[case]
    layer, x = layer_of(sizes, torch.float32), torch.randn(2, 70, 96)
    used = operators(lambda: run(layer, x)) & {"moh::cpu_route", "moh::cpu_layer"}
    assert used == ({"moh::cpu_route"} if case in ROUTE_ALONE else set())


@torch.no_grad()
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "proj"])
def test_a_bias_of_another_dtype_is_refused_as_by_pytorch(part):
    layer, x = layer_of({}, torch.bfloat16), torch.randn(2, 70, 96, dtype=torch.bfloat16)
    linear = layer.get_submodule(part)
    linear.bias = nn.Parameter(linear.bias.float())
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@torch.no_grad()
@pytest.mark.parametrize("part", ["router", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "proj"])
def test_hooks_see_what_they_wait_for(part):
    layer, x, seen = layer_of({}, torch.float32), torch.randn(2, 70, 96), []
    expected = layer(x)
    layer.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(layer(x), expected, torch.float32)
    assert len(seen) == 1


@torch.no_grad()
@pytest.mark.parametrize("part", ["q_norm", "k_norm", "norm", "proj"])
def test_hooks_in_a_vision_transformer_see_what_they_wait_for(part):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=4, embed_dim=48, depth=1, num_heads=3)
    model = timm.create_model("moh_vit", base="vit_tiny_patch16_224", **sizes, shared_heads=0, active_heads=2).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    expected = model(images)
    model.blocks[0].attn.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(model(images), expected, torch.float32)
    assert len(seen) == 1


@torch.no_grad()
def test_a_recording_holds_what_the_router_decided():
    layer, x = layer_of({}, torch.float32), torch.randn(2, 70, 96)
    with moh.record_routing(layer) as routing:
        assert operators(lambda: layer(x)) >= {"moh::cpu_layer"}
    assert len(routing) == 1
    assert torch.equal(routing.layers[0][1].gates, layer.router(x).gates)


@torch.no_grad()
def test_a_router_class_of_ones_own_decides():
    layer, x = layer_of({}, torch.float32), torch.randn(2, 70, 96)
    own = Reversed(layer.config, 96)
    own.load_state_dict(layer.router.state_dict())
    layer.router = own
    _, routing = layer(x, return_routing=True)
    assert torch.equal(routing.gates, own(x).gates)


@torch.no_grad()
def test_the_dial_turns_it():
    layer, x = layer_of({}, torch.float32), torch.randn(2, 70, 96)
    moh.set_active_heads(layer, 3)
    _, routing = layer(x, return_routing=True)
    assert routing.active.all()


@torch.no_grad()
def test_an_unfitted_threshold_is_refused():
    with pytest.raises(ValueError, match="thresholds must be fitted"):
        layer_of({"router": "threshold"}, torch.float32)(torch.randn(2, 70, 96))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"active": 7}, "active must be between 0 and 6", id="active"),
        pytest.param({"shared": [9]}, "shared heads must be between 0 and 7", id="shared"),
        pytest.param({"parts": 4}, "must be multiples of parts", id="parts"),
        pytest.param({"routed_weight": torch.randn(5, 12)}, "routed_weight must be", id="weight"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = route_arguments()
    torch.ops.moh.cpu_route(**given)
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_route(**given | change)


def route_arguments() -> dict[str, object]:
    return dict(x=torch.randn(1, 3, 12), shared_weight=None, routed_weight=torch.randn(6, 12), stage_weight=None, bias=None,
                shared=[0, 1], heads=8, hard=False, active=2, parts=1, together=1, threshold=None)  # fmt: skip


def layer_arguments(sparse: bool = True) -> dict[str, object]:
    weights, biases = [torch.randn(32, 12) for _ in range(3)], [torch.randn(32) for _ in range(3)]
    gates = torch.randint(2, (1, 3, 4)).float()
    return dict(x=torch.randn(1, 3, 12), gates=gates, weights=weights, biases=biases, o_weight=torch.randn(12, 32),
                o_bias=torch.randn(12), is_causal=False, scale=None, sparse=sparse)  # fmt: skip


@pytest.mark.parametrize("sparse", [True, False], ids=["active-pairs", "dense"])
@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"x": torch.randn(3, 12)}, "x must be", id="x"),
        pytest.param({"gates": torch.ones(1, 4, 4)}, "gates", id="gates"),
        pytest.param({"gates": torch.ones(1, 3, 4).half()}, "gates", id="dtype-of-gates"),
        pytest.param({"biases": [None]}, "one weight and bias", id="number-of-biases"),
        pytest.param({"biases": [torch.randn(32).bfloat16(), None, None]}, "bias must be", id="dtype-of-a-bias"),
        pytest.param({"biases": [None, None, torch.randn(1)]}, "bias must be", id="size-of-a-bias"),
        pytest.param({"o_bias": torch.randn(12).double()}, "o_bias must be", id="dtype-of-o_bias"),
        pytest.param({"o_bias": torch.randn(32)}, "o_bias must be", id="size-of-o_bias"),
        pytest.param({"o_weight": torch.randn(12, 24)}, "W_O must have", id="o_weight"),
    ],
)
def test_a_layers_bad_arguments_are_named(change, message, sparse):
    torch.ops.moh.cpu_layer(**layer_arguments(sparse))
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_layer(**layer_arguments(sparse) | change)


def parts_arguments(sparse: bool = True) -> tuple[dict[str, object], dict[str, object]]:
    """Of `cpu_project` and `cpu_attend`, with positions, groups and a mask."""
    layer = layer_arguments(sparse)
    weights, biases = [torch.randn(rows, 12) for rows in (32, 16, 16)], [torch.randn(rows) for rows in (32, 16, 16)]
    angles = torch.rand(1, 3, 8)
    project = dict(x=layer["x"], gates=layer["gates"], weights=weights, biases=biases, cos=angles.cos(), sin=angles.sin(),
                   sparse=sparse)  # fmt: skip
    q, k, v = torch.randn(1, 3, 4, 8).transpose(1, 2), *torch.randn(2, 1, 2, 3, 8)
    attend = dict(q=q, k=k, v=v, gates=layer["gates"], attn_mask=torch.rand(1, 1, 3, 3) < 0.8, o_weight=torch.randn(12, 32),
                  o_bias=torch.randn(12), is_causal=False, scale=None, sparse=sparse)  # fmt: skip
    return project, attend


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False], ids=["active-pairs", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_projections_rotate_active_queries_and_all_keys(isa, sparse, dtype):
    given, _ = parts_arguments(sparse)
    given = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    for part in ("weights", "biases"):
        given[part] = [tensor.to(dtype) for tensor in given[part]]
    got = torch.ops.moh.cpu_project(**given)
    x, active = given["x"].float(), (given["gates"] != 0).transpose(1, 2)  # [B, H, N]
    for part, weight, bias in zip(got, given["weights"], given["biases"], strict=True):
        expected = nn.functional.linear(x, weight.float(), bias.float()).unflatten(-1, (-1, 8)).transpose(1, 2)
        if part is not got[2]:
            first, second = expected.chunk(2, -1)
            expected = expected * given["cos"].float() + torch.cat([-second, first], -1) * given["sin"].float()
        seen = active if part is got[0] else torch.ones(part.shape[:3], dtype=torch.bool)
        assert_close(part[seen].float(), expected[seen], dtype)


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False], ids=["active-pairs", "dense"])
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_memory_of_the_input_may_be_in_any_order(order, sparse):
    given, _ = parts_arguments(sparse)
    given |= {"x": torch.randn(2, 3, 12), "gates": torch.ones(2, 3, 4)}
    expected = torch.ops.moh.cpu_project(**given)
    back = [order.index(d) for d in range(3)]
    x = given["x"].permute(order).contiguous().permute(back)
    for part, other in zip(torch.ops.moh.cpu_project(**given | {"x": x}), expected, strict=True):
        assert_close(part, other, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False], ids=["active-pairs", "dense"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_bits_of_the_halves_do_not_depend_on_the_number_of_threads(isa, threads, sparse, dtype):
    B, N, H, Hkv, D, C = 2, 300, 8, 4, 32, 128
    gates = (torch.rand(B, N, H) < 0.5).to(dtype)
    weights = [torch.randn(heads * D, C, dtype=dtype) for heads in (H, Hkv, Hkv)]
    angles = torch.rand(B, N, D)
    x, o_weight = torch.randn(B, N, C, dtype=dtype), torch.randn(C, H * D, dtype=dtype)
    seen, results = gates.transpose(1, 2) != 0, []
    for count in (1, 2, 3):
        threads(count)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        q, k, v = torch.ops.moh.cpu_project(x, gates, weights, [None] * 3, cos, sin, sparse)
        out = torch.ops.moh.cpu_attend(q, k, v, gates, None, o_weight, None, True, None, sparse)
        results.append((q[seen], k, v, out))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"sin": None}, "both cos and sin", id="sin"),
        pytest.param({"cos": torch.ones(1, 2, 8)}, "cos and sin must be", id="tokens"),
        pytest.param({"cos": torch.ones(1, 3, 8).half()}, "cos and sin must be", id="dtype"),
        pytest.param({"weights": [torch.randn(32, 12)]}, "three weights", id="weights"),
        pytest.param({"gates": torch.ones(1, 4, 4)}, "gates", id="gates"),
    ],
)
def test_bad_arguments_of_projections_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_project(**parts_arguments()[0] | change)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"gates": torch.ones(1, 4, 4)}, "gates", id="gates"),
        pytest.param({"o_weight": torch.randn(12, 24)}, "W_O must have", id="o_weight"),
        pytest.param({"o_bias": torch.randn(32)}, "o_bias must be", id="o_bias"),
        pytest.param({"attn_mask": torch.ones(1, 1, 3, 3).half()}, "attn_mask must be", id="mask"),
        *(
            pytest.param(
                {"attn_mask": torch.ones(shape)},
                r"attn_mask .*\[1, 4, 3, 3\], got \[" + str(shape[0]),
                id=f"mask-{shape}",
            )
            for shape in ((4,), (3, 2), (2, 3, 3), (2, 1, 3, 3), (1, 1, 1, 3, 3))
        ),
    ],
)
def test_bad_arguments_of_attention_with_its_output_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.moh.cpu_attend(**parts_arguments()[1] | change)


@pytest.mark.parametrize("sparse", [True, False], ids=["active-pairs", "dense"])
def test_operators_are_described_to_pytorch_as_they_are(sparse):
    torch.library.opcheck(torch.ops.moh.cpu_route.default, (), route_arguments())
    torch.library.opcheck(torch.ops.moh.cpu_layer.default, tuple(layer_arguments(sparse).values()))
    project, attend = parts_arguments(sparse)
    given = {**project, "gates": torch.ones(1, 3, 4)}  # queries of inactive pairs may be any numbers
    torch.library.opcheck(torch.ops.moh.cpu_project.default, tuple(given.values()))
    torch.library.opcheck(torch.ops.moh.cpu_attend.default, tuple(attend.values()))
