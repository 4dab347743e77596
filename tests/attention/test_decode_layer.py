"""Promises of the operator for one new token: equal to the layer in PyTorch, in one call that reads fewer weights."""

from __future__ import annotations

import pytest
import torch
from decode_layer_cases import CASES, assert_close, call, definition, inputs, to

from moh import MoHConfig

pytestmark = pytest.mark.usefixtures("kernels")

ROUTING = [
    pytest.param(dict(shared=[1], active=2, router=True), id="router-1-shared-2-active"),
    pytest.param(dict(shared=[], active=1, router=True), id="router-1-active"),
    pytest.param(dict(shared=[0, 2, 3], active=0, router=True), id="router-none-routed"),
    pytest.param(dict(shared=[0], active=-1, router=True), id="router-all-active"),
    pytest.param(dict(shared=[1], active=2, router=True, threshold=0.3), id="threshold-1-shared"),
    pytest.param(dict(shared=[], active=1, router=True, threshold=-0.2), id="threshold"),
    pytest.param(dict(shared=[], active=0, router=False), id="gates-given"),
]


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("sizes", CASES)
@torch.no_grad()
def test_output_and_cache_are_those_of_the_definition(isa, sizes, routing):
    case, config = inputs(**sizes, **routing)
    expected, keys, values = definition(case, config)
    n = case["length"] + 1
    later = [cache[:, :, n:].clone() for cache in case["caches"]]
    assert_close(call(case), expected)
    assert_close(case["caches"][0][:, :, :n], keys)
    assert_close(case["caches"][1][:, :, :n], values)
    assert all(torch.equal(cache[:, :, n:], kept) for cache, kept in zip(case["caches"], later, strict=True))


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize(
    "unit, shared, active, choice",
    [
        pytest.param("group_balanced", [], 3, (3, 1), id="1-of-3-in-each-group"),
        pytest.param("group_balanced", [1, 5, 6], 3, (3, 1), id="1-of-2-and-a-shared-one"),
        pytest.param("kv_group", [], 3, (1, 3), id="1-group-of-3"),
        pytest.param("kv_group", [3, 4, 5], 3, (1, 3), id="1-group-of-2-and-a-shared-one"),
        pytest.param("kv_group", [], 9, (1, 3), id="all-groups"),
    ],
)
@torch.no_grad()
def test_heads_are_chosen_in_groups_as_by_the_router(kernels, unit, shared, active, choice, B):
    case, _ = inputs(B=B, H=9, Hkv=3, shared=shared, active=active)
    config = MoHConfig(9, shared, active, "linear", routing_unit=unit, kv_heads=3)
    expected = definition(case, config)[0]
    assert_close(call(case | {"choice": choice}), expected)


@torch.no_grad()
def test_groups_that_do_not_add_up_are_refused(kernels):
    case, _ = inputs(H=9, Hkv=3, shared=[], active=4)
    with pytest.raises(ValueError, match=r"multiples of parts \* together = 3, got 4 and 9"):
        call(case | {"choice": (1, 3)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_sixteen_bits_are_the_definition_in_float32(isa, dtype):
    # Gates are given because rounded predictions may be ranked differently
    case = to(inputs(B=2, H=9, Hkv=3, D=64, C=100, length=90, bias=True, router=False)[0], dtype)
    expected, keys, _ = definition(to(case, torch.float32), None)
    assert_close(call(case), expected)
    assert_close(case["caches"][0][:, :, :91], keys)


@torch.no_grad()
def test_weights_of_inactive_heads_are_not_read():
    case, _ = inputs(router=False)
    case["gates"] = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]])
    expected = call(case)
    q_weight, o_weight = case["projections"][0], case["projections"][6]
    for head in (0, 2):
        q_weight[head * 16 : (head + 1) * 16] = torch.nan
        o_weight[:, head * 16 : (head + 1) * 16] = torch.nan
    assert torch.equal(call(case), expected)


@torch.no_grad()
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    case, _ = inputs(H=9, Hkv=3, D=64, C=576, length=1100)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(call(case))
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_a_nan_makes_the_first_routed_heads_active_and_reaches_the_output():
    case, _ = inputs(shared=[3], active=1)
    case["x"][0, 0, 0] = torch.nan
    assert call(case).isnan().all()


@torch.no_grad()
def test_transposed_weights_and_caches_with_any_strides_are_read_as_they_lie():
    case, config = inputs()
    case["projections"][0] = case["projections"][0].t().contiguous().t()
    case["caches"] = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in case["caches"]]
    expected = definition(case, config)[0]
    assert_close(call(case), expected)


def test_operator_is_registered_correctly():
    case, _ = inputs(bias=True, mask="bool")
    arguments = (
        case["x"],
        None,
        *case["router"],
        *case["heads"],
        *case["projections"],
        *case["angles"],
        *case["caches"],
        case["length"],
        case["mask"],
        0.3,
    )
    torch.library.opcheck(torch.ops.moh.cpu_decode_layer.default, arguments)


@pytest.mark.parametrize(
    "message, change",
    [
        (r"x must be \[B, 1, C\]", dict(x=torch.zeros(1, 2, 24))),
        ("length must be below the caches' 47, got 47", dict(length=47)),
        ("either gates or a router", dict(gates=torch.ones(1, 1, 4))),
        (r"gates must be \[B, 1, H = 4\]", dict(gates=torch.ones(1, 1, 3), router=[None, None])),
        ("active must be between 0 and 3, got 4", dict(heads=[[1], 4])),
        ("shared heads must be between 0 and 3, got 4", dict(heads=[[4], 1])),
        (r"keys and values must be \[B, Hkv, capacity, D\]", dict(caches=[torch.zeros(1, 2, 47, 16)] * 1)),
        ("cos and sin must be", dict(angles=[torch.ones(1, 1, 8), torch.ones(1, 1, 8)])),
        ("q's weight must have 2 dimensions and x's dtype", dict(projections=0)),
        ("must match x and the cache", dict(projections=2)),
    ],
    ids=["tokens", "full", "both", "gates", "active", "shared", "caches", "angles", "dtype", "weights"],
)
def test_arguments_that_do_not_fit_are_refused(message, change):
    case, _ = inputs()
    if change.get("projections") == 0:
        case["projections"][0] = case["projections"][0].double()
    elif change.get("projections") == 2:
        case["projections"][2] = case["projections"][2][:-1]
    elif "caches" in change:
        case["caches"][1] = case["caches"][1][:, :1]
    else:
        case |= change
    with pytest.raises(ValueError, match=message):
        call(case)
