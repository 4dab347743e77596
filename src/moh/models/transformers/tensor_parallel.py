"""Tensor parallelism of a MoH Llama model: every process holds a slice of the heads, shared and routed ones alike.

PyTorch's DTensor splits the projections and the MLP; here is what MoH needs beside it. Every process knows all gates,
of which it uses those of its slice. Not for reordering the heads (`interleave_shared_heads`), nor for splitting data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moh.models.transformers.head_order import check_ranks
from moh.routing import Router, RoutingInfo


def split_heads(model: Any, mesh: DeviceMesh) -> None:
    """Split attention and MLP of every layer over the processes of `mesh`, in place.

    Projections become DTensors, of which each process has its part; norms, routers, embeddings and the language-modelling
    head stay whole, and get the whole gradient on every process. All processes must be given the same tokens. The model
    may then be sharded over a second dimension of the mesh (`torch.distributed.fsdp.fully_shard`).

    Args:
        model: a `MoHLlamaModel` or `MoHLlamaForCausalLM`, the same on every process, best after
            `interleave_shared_heads(model, mesh.size())`.
        mesh: of one dimension.

    Raises:
        ValueError: the heads can't be divided, or the model routes or projects in a way that can't be split.
    """
    config = model.config
    check_ranks(config, mesh.size())
    if config.intermediate_size % mesh.size():
        raise ValueError(f"ranks must divide intermediate_size = {config.intermediate_size}, got {mesh.size()}")
    if config.routing_unit == "kv_group":
        raise ValueError('routing_unit must be "head" or "group_balanced" to split heads, got "kv_group"')
    if config.output_budgets is not None:
        raise ValueError("model must not have config.output_budgets: their changes to W_O are not split")
    for layer in model.base_model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        parallelize_module(
            layer, mesh, {**plan, "self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        )
        _GatesOfSlice(layer.self_attn.router, mesh)


class _GatesOfSlice:
    """Lets a router see all heads and its layer the gates of this process's slice alone; recorders get all gates."""

    def __init__(self, router: Router, mesh: DeviceMesh) -> None:
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()
        router.heads_here = router.config.num_heads // mesh.size()
        if router.uses_queries:
            router.register_forward_pre_hook(self.gather_norms, with_kwargs=True)
        router.register_forward_hook(self.slice_gates)
        self.dtype: torch.dtype | None = None

    def gather_norms(self, router: Router, args: Any, kwargs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Give the router a number for every query that has the query's norm, in place of the queries."""
        q = kwargs["q"]  # [B, N, H / ranks, D]
        self.dtype = q.dtype
        return args, {"q": _Gathered.apply(q.float().norm(dim=-1), self.group)[..., None]}  # [B, N, H, 1]

    def slice_gates(self, router: Router, args: Any, info: RoutingInfo) -> RoutingInfo:
        gates = _WholeGradient.apply(info.gates, self.group).narrow(
            -1, self.rank * router.heads_here, router.heads_here
        )
        return dataclasses.replace(info, gates=gates.to(self.dtype or gates.dtype))


class _Gathered(torch.autograd.Function):
    """All processes' parts of a tensor, joined along the last dimension. Its gradient is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        ctx.rank, ctx.width = group.rank(), x.shape[-1]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.rank * ctx.width, ctx.width), None


class _WholeGradient(torch.autograd.Function):
    """A tensor that is the same on all processes, and used by each in part: the gradients of the parts are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
