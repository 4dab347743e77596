"""What training a language model of the Llama family over many GPUs takes: memory, operations, traffic and time per step.

Computed from the model's shapes and from stated assumptions on the machine; nothing is measured, and nothing is run.
Sharding is FSDP's (every state over all GPUs), with activation checkpointing of whole layers. The page: docs/results/sizing.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig

from moh.config import MoHConfig
from moh.models.transformers import MoHLlamaConfig
from moh.routing import build_router, router_class

GIB = 2**30
_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Gpu:
    """A GPU and its network. Rates are peaks; `matmul`, `attention` and `network` say which part of them is reached.

    Args:
        name: for the table.
        memory: bytes.
        flops: dense bfloat16 operations per second (a multiplication and an addition are two).
        intra_node: bytes per second that a GPU sends to the others of its node, in one direction.
        inter_node: bytes per second of a GPU's share of its node's network.
        gpus_per_node: GPUs that the faster links join.
        matmul: reached share of `flops` in projections and feed-forward layers.
        attention: reached share of `flops` in the attention core.
        network: reached share of the links' rates.
        reserved: bytes that the context, the collectives' buffers and fragmentation take.
    """

    name: str = "H100 SXM, 80 GB"
    memory: float = 80e9
    flops: float = 989e12
    intra_node: float = 450e9
    inter_node: float = 50e9
    gpus_per_node: int = 8
    matmul: float = 0.6
    attention: float = 0.45
    network: float = 0.7
    reserved: float = 6 * GIB


@dataclass(frozen=True)
class Plan:
    """How a step is spread: sequences of `sequence` tokens, `batch_tokens` of them in all, `micro_batch` sequences at once.

    `attention_ratio` is the time of the attention core at the share of heads used, in relation to all heads: None means in
    proportion to the share, which no kernel quite reaches.

    Raises:
        ValueError: the batch does not divide into the GPUs' micro-batches.
    """

    gpus: int
    sequence: int = 8192
    batch_tokens: int = 16 * 2**20
    micro_batch: int = 1
    attention_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.batch_tokens % (self.gpus * self.micro_batch * self.sequence):
            raise ValueError(
                f"batch_tokens must be a multiple of gpus * micro_batch * sequence = "
                f"{self.gpus * self.micro_batch * self.sequence}, got {self.batch_tokens}"
            )

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of each GPU in a step."""
        return self.batch_tokens // (self.gpus * self.micro_batch * self.sequence)


@dataclass(frozen=True)
class Size:
    """What a step takes. Memory in bytes per GPU, times in seconds."""

    parameters: int
    weights: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    logits: float
    reserved: float
    matmul_flops: float = field(metadata={"of": "one token, forward"})
    attention_flops: float = field(metadata={"of": "one token, forward"})
    compute: float
    attention: float
    communication: float

    @property
    def memory(self) -> float:
        """Bytes per GPU in all."""
        return (
            self.weights
            + self.optimizer
            + self.gradients
            + self.gathered
            + self.activations
            + self.logits
            + self.reserved
        )

    @property
    def step(self) -> float:
        """Seconds per step when traffic hides behind computing, as far as it can."""
        return max(self.compute, self.communication)


def heads_of(config: LlamaConfig) -> list[MoHConfig | None]:
    """Each layer's heads; None for a dense layer."""
    if isinstance(config, MoHLlamaConfig):
        return list(config.layer_configs())
    return [None] * config.num_hidden_layers


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Parameters by part: `embedding` (input and, where it is not tied, output), `layers`, `largest_layer`.

    Raises:
        ValueError: the configuration has biases, which this count leaves out.
    """
    if config.attention_bias or config.mlp_bias:
        raise ValueError("config must have no biases (attention_bias, mlp_bias): they are not counted")
    layers = [_layer_parameters(config, heads) for heads in heads_of(config)]
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return {"embedding": embedding, "layers": sum(layers) + config.hidden_size, "largest_layer": max(layers)}


def _layer_parameters(config: LlamaConfig, heads: MoHConfig | None) -> int:
    C, D = config.hidden_size, config.head_dim
    attention: int = 2 * C * D * (config.num_attention_heads + config.num_key_value_heads)
    rest: int = 3 * C * config.intermediate_size + 2 * C
    return attention + rest + _router_parameters(C, heads)


def _router_parameters(width: int, heads: MoHConfig | None) -> int:
    if heads is None:
        return 0
    return sum(p.numel() for p in build_router(heads, width, device=torch.device("meta")).parameters())


def forward_flops(config: LlamaConfig, sequence: int) -> tuple[float, float]:
    """Operations of one token's forward pass, the mean over a causal sequence: (matrix products, attention core).

    Keys, values and the feed-forward layer are computed for every token; queries and the output projection for active heads
    alone, except that a router that reads the queries needs those of every head before it knows which are active.
    """
    C, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
    products = 2.0 * C * config.vocab_size
    core = 0.0
    for heads in heads_of(config):
        share = 1.0 if heads is None else heads.share
        queries = 1.0 if heads is None or router_class(heads.router).reads_queries else share
        products += 2.0 * C * D * (H * queries + 2 * config.num_key_value_heads + H * share)
        products += 2.0 * (3 * C * config.intermediate_size + _router_parameters(C, heads))
        core += 4.0 * H * share * D * (sequence + 1) / 2
    return products, core


def size(config: LlamaConfig, plan: Plan, gpu: Gpu | None = None) -> Size:
    """Memory, traffic and time of one optimiser step.

    Args:
        config: a dense Llama's, or a `MoHLlamaConfig`.
        plan: batch and GPUs.
        gpu: None means `Gpu()`.
    """
    gpu = gpu or Gpu()
    counts = parameters(config)
    total = counts["embedding"] + counts["layers"]
    tokens = plan.micro_batch * plan.sequence
    products, core = forward_flops(config, plan.sequence)
    # A checkpointed layer runs forward twice and backward (twice a forward) once; the logits' product is not run again
    repeated = 4 * products - 2.0 * config.hidden_size * config.vocab_size
    per_gpu = plan.batch_tokens / plan.gpus
    attention = 4 * core / _share(config) * _attention_ratio(config, plan) * per_gpu / (gpu.flops * gpu.attention)
    compute = repeated * per_gpu / (gpu.flops * gpu.matmul) + attention
    # Weights are gathered for forward and for backward in bfloat16, gradients are reduced in float32
    traffic = total * (2 * _BF16 + _FP32) * plan.micro_steps
    return Size(
        parameters=total,
        weights=total * _FP32 / plan.gpus,
        optimizer=total * 2 * _FP32 / plan.gpus,
        gradients=total * _FP32 / plan.gpus,
        gathered=_BF16 * (2 * counts["largest_layer"] + counts["embedding"]) + _FP32 * counts["largest_layer"],
        activations=tokens * _BF16 * (config.num_hidden_layers * config.hidden_size + _inside_a_layer(config)),
        logits=tokens * config.vocab_size * (_BF16 + 2 * _FP32),
        reserved=gpu.reserved,
        matmul_flops=products,
        attention_flops=core,
        compute=compute,
        attention=attention,
        communication=traffic / _rate(plan.gpus, gpu),
    )


def _share(config: LlamaConfig) -> float:
    return config.share if isinstance(config, MoHLlamaConfig) else 1.0


def _attention_ratio(config: LlamaConfig, plan: Plan) -> float:
    share = _share(config)
    return share if plan.attention_ratio is None or share == 1 else plan.attention_ratio


def _inside_a_layer(config: LlamaConfig) -> int:
    """Numbers that a layer keeps per token for its backward pass, which one layer at a time needs: bounded from above.

    Two norms and two residuals, queries, keys, values and heads before their projections, and three of the feed-forward
    layer's width (gate, up, their product), whose gradients take as much again.
    """
    heads: int = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    wide: int = 4 * config.hidden_size + 3 * config.intermediate_size
    return 2 * (wide + heads)


def _rate(gpus: int, gpu: Gpu) -> float:
    """Bytes of weights per second that reach every GPU in an all-gather (or leave it in a reduce-scatter)."""
    inside = min(gpus, gpu.gpus_per_node)
    nodes = gpus / gpu.gpus_per_node
    seconds = (inside - 1) / inside / gpu.intra_node
    if nodes > 1:  # all links of a node carry its share of what comes from the others
        seconds = max(seconds, (nodes - 1) / nodes / (gpu.inter_node * gpu.gpus_per_node))
    return gpu.network / seconds if seconds else float("inf")
