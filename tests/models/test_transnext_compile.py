"""Promises of torch.export and torch.compile: one graph, the same numbers, in evaluation and in training."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

from transnext_cases import assert_close, tiny_model

# One stage of each kind of attention is enough.
TWO_STAGES = dict(
    img_size=16,
    embed_dims=(8, 16),
    num_heads=(2, 4),
    depths=(1, 1),
    mlp_ratios=(2, 2),
    sr_ratios=(2, 1),
)
ROUTED = dict(shared_heads=(1, 1), active_heads=(1, 2))


def two_stages(**options):
    return tiny_model(**TWO_STAGES | ROUTED | options)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [None, "sdpa"], ids=["fastest", "sdpa"])
@torch.no_grad()
def test_exported_model_gives_the_models_numbers(backend):
    model, x = two_stages(backend=backend), torch.randn(2, 3, 16, 16)
    expected = model(x)  # caches position biases, which the export must not take as constants
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), expected, 1e-5)
    assert set(program.state_dict) == set(model.state_dict())
    assert not program.constants


@pytest.mark.parametrize(
    ("options", "compiler"),
    [
        pytest.param({}, "aot_eager", id="fastest"),
        pytest.param(dict(backend="sdpa"), "eager", id="sdpa"),
        pytest.param(dict(shared_heads=None, active_heads=None), "eager", id="dense"),
    ],
)
def test_compiled_model_trains_in_one_graph(options, compiler):
    x = torch.randn(2, 3, 16, 16)
    results = []
    for compiled in (False, True):
        model = two_stages(**options).train()
        run = torch.compile(model, fullgraph=True, backend=compiler) if compiled else model
        logits = run(x)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_model_evaluates_in_one_graph_and_follows_the_weights():
    model, x = two_stages(), torch.randn(2, 3, 16, 16)
    run = torch.compile(model, fullgraph=True, backend="eager")
    before = run(x)
    assert_close(before, model(x), 1e-5)
    for stage in model.stages:
        stage.blocks[0].attn.position_bias.fc2.weight.neg_()
    assert not torch.allclose(run(x), before)
    assert_close(run(x), model(x), 1e-5)
