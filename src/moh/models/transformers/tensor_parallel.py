"""Tensor parallelism: every process holds a slice of the heads, shared and routed ones alike.

DTensor splits the projections and the MLP: by transformers' plan for the family (`from_pretrained(distributed_config=...)`)
or, in families whose attention is plain (Llama, Mistral, Qwen2, Gemma, Granite, StarCoder2), by `split_heads`. MoH also
needs the gates, of which every process computes all and uses those of its slice, and works best with the heads in an order
in which equal slices have equally many shared heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from moh.config import MoHConfig
from moh.models.heads import compact_heads
from moh.models.transformers.families import FAMILIES, family_of
from moh.models.transformers.family import Family, at
from moh.models.transformers.fixed import refuse_fixed_heads
from moh.routing import Router, RoutingInfo

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""Names in transformers' own plans (`config.base_model_tp_plan`) -> how torch splits such a projection."""

_GATES = "moh_gates_of_slice"


def plan_with_gates(family: Family, dense: Mapping[str, str] | None) -> dict[str, str] | None:
    """`base_model_tp_plan` of our configuration: the dense family's, with the routers' part; None where it doesn't hold.

    Where every process gets all queries, it computes all heads (Phi-3), and the dense plan holds as it is.
    """
    attention = f"{family.layers}.*.{family.attention_of_layer}"
    queries = ".".join(filter(None, (attention, family.core, family.fused or family.queries)))
    style = (dense or {}).get(queries)
    if dense is None or style is None:
        return None
    if style == "colwise":
        # A slice of a fused projection would be taken for all heads
        return None if family.fused else {**dense, f"{attention}.router": _GATES}
    return dict(dense) if style in ("colwise_gather_output", "colwise_rep") else None


def splits_heads(plan: Mapping[str, str] | None) -> bool:
    """Whether a plan of transformers, made by `plan_with_gates`, gives every process a slice of the heads."""
    return _GATES in (plan or {}).values()


def check_split(config: Any, ranks: int, *, name: str) -> None:
    """Check that the heads of a model can be split over processes.

    Args:
        config: of any of our models of transformers.
        ranks: number of processes.
        name: what gives this number, for the message.

    Raises:
        ValueError: the heads can't be divided, or the model routes or projects in a way that can't be split.
    """
    refuse_fixed_heads(config.layer_configs(), "splitting the heads over processes")
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if heads is not None and (ranks < 1 or heads % ranks):
            raise ValueError(f"{name} must divide {field} = {heads}, got {ranks}")
    if config.routing_unit == "kv_group":
        raise ValueError('routing_unit must be "head" or "group_balanced" to split heads, got "kv_group"')
    if config.output_changes is not None:
        raise ValueError("model must not have config.output_changes: these changes of W_O are not split")


@torch.no_grad()
def interleave_shared_heads(model: Any, ranks: int) -> list[list[int]]:
    """Reorder the heads of every layer, in place, so that each of `ranks` equal slices has its share of shared heads.

    Heads that share keys and values move together, so the shares are equal if the groups allow it: always with
    `routing_unit="group_balanced"` and, without grouped-query attention, if `ranks` divides the number of shared heads;
    otherwise as nearly equal as a greedy choice gets them.

    Args:
        model: of a family whose attention is plain, such as `MoHLlamaForCausalLM`; its weights and `config.shared_heads` change.
        ranks: number of slices; it must divide the numbers of heads and of key/value heads.

    Returns:
        for every layer the number of shared heads of each slice.

    Raises:
        ValueError: the model is of another kind, the heads can't be divided, or the model has a W_O for each
            number of heads.
    """
    config, family = model.config, _checked_family(model.config, ranks)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.output_changes is not None:
        raise ValueError("model must not have config.output_changes: these changes of W_O are not reordered")
    configs, counts = [], []
    for layer, before in zip(at(model.base_model, family.layers), config.layer_configs(), strict=True):
        order = _group_order(before, heads // groups, groups, ranks)
        head_order = [group * (heads // groups) + i for group in order for i in range(heads // groups)]
        attention = at(layer, family.attention_of_layer)
        _move_heads(attention, head_order, order)
        configs.append(attention.router.config)
        shared = set(configs[-1].shared_indices)
        size = heads // ranks
        counts.append([len(shared.intersection(range(rank * size, (rank + 1) * size))) for rank in range(ranks)])
    config.shared_heads = compact_heads(configs)["shared_heads"]
    return counts


def split_heads(model: Any, mesh: DeviceMesh) -> None:
    """Split attention and MLP of every layer over the processes of `mesh`, in place.

    Projections become DTensors, of which each process has its part; norms, routers, embeddings and the language-modelling
    head stay whole, and get the whole gradient on every process. All processes must be given the same tokens. The model
    may then be sharded over a second dimension of the mesh (`torch.distributed.fsdp.fully_shard`).

    Args:
        model: of a family whose attention is plain, such as `MoHLlamaForCausalLM`; the same on every process, best after
            `interleave_shared_heads(model, mesh.size())`.
        mesh: of one dimension.

    Raises:
        ValueError: the model is of another kind, its heads can't be divided, or it routes or projects in a way that can't
            be split.
    """
    config, family = model.config, _checked_family(model.config, mesh.size())
    check_split(config, mesh.size(), name="ranks")
    if config.intermediate_size % mesh.size():
        raise ValueError(f"ranks must divide intermediate_size = {config.intermediate_size}, got {mesh.size()}")
    attention = family.attention_of_layer
    plan = {f"{attention}.{name}": "colwise" for name in (family.queries, family.keys, family.values)}
    plan[f"{attention}.{family.output}"] = "rowwise"
    named = {name.removeprefix(f"{family.layers}.*."): style for name, style in config.base_model_tp_plan.items()}
    plan |= {name: style for name, style in named.items() if name.startswith("mlp.")}
    for layer in at(model.base_model, family.layers):
        parallelize_module(layer, mesh, {name: _STYLES[style]() for name, style in plan.items()})
        _GatesOfSlice(at(layer, attention).router, mesh)


def _checked_family(config: Any, ranks: int) -> Family:
    """The model's family.

    Raises:
        ValueError: its attention is not plain, or its heads can't be divided.
    """
    family = family_of(config.model_type)
    if family is None or not family.is_plain:
        plain = ", ".join(f"moh_{f.model_type}" for f in FAMILIES if f.is_plain)
        raise ValueError(f"model must be of a type among {plain} to split its heads, got {config.model_type!r}")
    refuse_fixed_heads(config.layer_configs(), "splitting the heads over processes")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if ranks < 1 or getattr(config, name) % ranks:
            raise ValueError(f"ranks must divide {name} = {getattr(config, name)}, got {ranks}")
    return family


def _group_order(config: MoHConfig, size: int, groups: int, ranks: int) -> list[int]:
    """The key/value groups in their new order: those with most shared heads first, each to the slice with the fewest."""
    shared = [sum(head // size == group for head in config.shared_indices) for group in range(groups)]
    slices: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(range(groups), key=lambda group: -shared[group]):
        open_slices = [members for members in slices if len(members) < groups // ranks]
        min(open_slices, key=lambda members: sum(shared[other] for other in members)).append(group)
    return [group for members in slices for group in sorted(members)]


def _move_heads(attention: Any, head_order: Sequence[int], group_order: Sequence[int]) -> None:
    """Move the rows, columns and router's outputs of one layer; head i becomes the former `head_order[i]`."""
    for linear, order in (
        (attention.query_projection, head_order),
        (attention.key_projection, group_order),
        (attention.value_projection, group_order),
    ):
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                tensor.copy_(_moved(tensor, order))
    output = attention.output_projection.weight
    output.copy_(_moved(output.t(), head_order).t())
    attention.router.reorder(head_order)


def _moved(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`tensor` with the equal blocks of its first dimension in another order."""
    moved: Tensor = tensor.unflatten(0, (len(order), -1))[list(order)]
    return moved.flatten(0, 1)


class _GatesOfSlice:
    """Lets a router see all heads and its layer the gates of this process's slice alone; recorders get all gates."""

    def __init__(self, router: Router, mesh: DeviceMesh) -> None:
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()
        router.heads_here = router.config.num_heads // mesh.size()
        if router.reads_queries:
            router.register_forward_pre_hook(self.gather_norms, with_kwargs=True)
        router.register_forward_hook(self.slice_gates)
        self.dtype: torch.dtype | None = None

    def gather_norms(self, router: Router, args: Any, kwargs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Replace every query by one number with its norm, which is all that the router uses."""
        q = kwargs["q"]  # [B, N, H / ranks, D]
        self.dtype = q.dtype
        norms = (q if router.rounds else q.float()).norm(dim=-1)  # in the dtype that the router takes them in
        return args, {"q": _Gathered.apply(norms, self.group)[..., None]}  # [B, N, H, 1]

    def slice_gates(self, router: Router, args: Any, info: RoutingInfo) -> RoutingInfo:
        gates = _WholeGradient.apply(info.gates, self.group).narrow(
            -1, self.rank * router.heads_here, router.heads_here
        )
        return dataclasses.replace(info, gates=gates.to(self.dtype or gates.dtype))


class _GatesStyle(TensorParallelLayer):  # type: ignore[misc]  # untyped
    """A router in a plan of transformers: whole on every process, which uses the gates of its slice."""

    def install_forward(self, module: Router, mesh: DeviceMesh) -> Router:
        _GatesOfSlice(module, mesh)
        return module


ALL_PARALLEL_STYLES.register(_GATES, _GatesStyle())


class _Gathered(torch.autograd.Function):
    """All processes' parts of a tensor, joined along the last dimension. Its gradient is the same on all: each takes its part."""

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
