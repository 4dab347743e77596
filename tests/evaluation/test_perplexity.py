"""Perplexity follows its definition, however the blocks are batched."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moh
from moh.evaluation import perplexity, perplexity_rise


@pytest.fixture(params=["dense", "moh"])
def model(request: pytest.FixtureRequest):
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    dense = LlamaForCausalLM(config)
    with torch.no_grad():
        dense.lm_head.weight.mul_(20)  # far from a uniform distribution
    if request.param == "dense":
        return dense.train()
    return moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm").train()


def test_it_equals_a_direct_computation(model) -> None:
    blocks = torch.randint(30, (5, 9))
    result = perplexity(model, blocks, batch_size=2)
    assert model.training  # unchanged
    model.eval()
    means = []
    for block in blocks:
        with torch.no_grad():
            log_p = model(block[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(log_p[n, block[n + 1]].item() for n in range(8)) / 8)
    mean = sum(means) / 5
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 4)
    assert result.loss == pytest.approx(mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.stderr == pytest.approx(spread / math.sqrt(5), rel=1e-4)
    assert result.tokens == 40
    assert result.block_losses == pytest.approx(means, rel=1e-5)


def test_it_is_the_loss_that_transformers_computes(model) -> None:
    blocks = torch.randint(30, (3, 12))
    result = perplexity(model, blocks)
    assert result.loss == pytest.approx(model.eval()(blocks, labels=blocks).loss.item(), rel=1e-5)


def test_the_batch_size_changes_nothing(model) -> None:
    blocks = torch.randint(30, (7, 6))
    results = [perplexity(model, blocks, batch_size=size).block_losses for size in (1, 3, 7)]
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_one_block_has_no_standard_error(model) -> None:
    assert math.isnan(perplexity(model, torch.randint(30, (1, 6))).stderr)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_blocks_that_predict_nothing_are_refused(model, shape) -> None:
    with pytest.raises(ValueError, match=r"blocks must be \[n, seq_len\] with n >= 1 and seq_len >= 2, got"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perplexity(model, torch.zeros(2, 4, dtype=torch.long), batch_size=0)


def test_a_rise_is_paired_over_blocks() -> None:
    above, stderr = perplexity_rise((2.1, 3.2, 4.3), (2.0, 3.0, 4.0))  # rises 0.1, 0.2, 0.3
    assert above == pytest.approx(100 * math.expm1(0.2), rel=1e-5)
    assert stderr == pytest.approx(100 * 0.1 / math.sqrt(3), rel=1e-5)
