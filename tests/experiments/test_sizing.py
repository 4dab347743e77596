"""The computed sizes of a training step equal what the models have and do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sizing_estimates import Gpu, Plan, forward_flops, parameters, size
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

SHAPES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
)
MODELS = {
    "dense": LlamaConfig(**SHAPES),
    "tied": LlamaConfig(**SHAPES, tie_word_embeddings=True),
    "query_norm": MoHLlamaConfig(**SHAPES, router="query_norm", shared_heads=2, active_heads=2),
    "linear": MoHLlamaConfig(**SHAPES, router="linear", shared_heads=2, active_heads=2),
    "two_stage": MoHLlamaConfig(**SHAPES, router="two_stage", shared_heads=2, active_heads=2),
    "two_stage-all-shared": MoHLlamaConfig(**SHAPES, router="two_stage", shared_heads=6, active_heads=0),
    "two_stage-one-shared": MoHLlamaConfig(**SHAPES, router="two_stage", shared_heads=1, active_heads=2),
    "two_stage-none-shared": MoHLlamaConfig(**SHAPES, router="two_stage", shared_heads=0, active_heads=2),
    "single_stage": MoHLlamaConfig(**SHAPES, router="single_stage", shared_heads=2, active_heads=2),
    "uneven": MoHLlamaConfig(**SHAPES, router="linear", shared_heads=[1, 2, 6], active_heads=[3, 0, 0]),
}
LLAMA3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_parameter_is_counted(config: LlamaConfig) -> None:
    with torch.device("meta"):
        model = (MoHLlamaForCausalLM if isinstance(config, MoHLlamaConfig) else LlamaForCausalLM)(config)
    counts = parameters(config)
    assert counts["embedding"] + counts["layers"] == sum(p.numel() for p in model.parameters())
    assert counts["largest_layer"] == max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)


def test_the_operations_are_those_that_torch_counts() -> None:
    torch.manual_seed(0)
    N = 20
    model = LlamaForCausalLM._from_config(MODELS["dense"], attn_implementation="eager").eval()  # products torch sees
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 97, (1, N)), use_cache=False)
    products, core = forward_flops(MODELS["dense"], N)
    full = core * 2 * N / (N + 1)  # torch counts the masked half too
    assert counter.get_total_flops() == pytest.approx(N * (products + full), abs=2 * 4 * N)  # rotary angles


def test_operations_fall_with_the_heads_but_for_what_every_token_needs() -> None:
    dense, half = (forward_flops(replace_heads(k), 64) for k in (4, 1))
    assert half[1] == dense[1] / 2  # 3 of 6 heads
    skipped = 3 * 2 * (2 * 48 * 8) * 3  # queries and output projection of three heads in three layers
    assert dense[0] - half[0] == skipped
    by_norm = [forward_flops(replace_heads(k, "query_norm"), 64)[0] for k in (4, 1)]
    assert by_norm[0] - by_norm[1] == skipped / 2  # this router reads all queries


def replace_heads(active: int, router: str = "linear") -> MoHLlamaConfig:
    return MoHLlamaConfig(**SHAPES, router=router, shared_heads=2, active_heads=active)


def test_states_are_shared_out_and_activations_are_not() -> None:
    few, many = (size(LLAMA3_8B, Plan(gpus)) for gpus in (8, 64))
    assert few.parameters == 8_030_261_248
    assert few.weights == 4 * few.parameters / 8 and few.optimizer == 2 * few.weights == 2 * few.gradients
    assert many.weights == few.weights / 8
    assert (many.activations, many.logits, many.gathered) == (few.activations, few.logits, few.gathered)
    assert few.memory == pytest.approx(
        few.weights + few.optimizer + few.gradients + few.gathered + few.activations + few.logits + few.reserved
    )


def test_the_same_step_takes_the_same_work_however_it_is_spread() -> None:
    one, eight, nodes = (size(LLAMA3_8B, Plan(gpus)) for gpus in (1, 8, 512))
    assert one.compute == pytest.approx(8 * eight.compute) == pytest.approx(512 * nodes.compute)
    assert one.communication == 0 < nodes.communication
    slow = size(LLAMA3_8B, Plan(512), replace(Gpu(), inter_node=1e9))
    assert slow.step == slow.communication > slow.compute


def test_a_kernel_that_misses_proportion_is_told_by_its_ratio() -> None:
    config = MoHLlamaConfig(**SHAPES, router="linear", shared_heads=2, active_heads=1)
    plan = Plan(8, 1024, batch_tokens=2**16)
    dense, ideal, real = (
        size(c, p) for c, p in [(MODELS["dense"], plan), (config, plan), (config, replace(plan, attention_ratio=0.62))]
    )
    assert ideal.attention == pytest.approx(0.5 * dense.attention)
    assert real.attention == pytest.approx(0.62 * dense.attention)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_tokens must be a multiple of .* = 24576, got 16384"):
        Plan(3, 8192, batch_tokens=16_384)


def test_biases_are_not_silently_left_out() -> None:
    with pytest.raises(ValueError, match="config must have no biases"):
        parameters(LlamaConfig(**SHAPES, attention_bias=True))
