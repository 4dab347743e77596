"""The projections' Triton kernels as operators of PyTorch, each the other's gradient, and when they pay off.

With M `[H * D, C]`: `expand` is `heads[t, h] = M[h] x[t]`, `sum_heads` is `x[t] = sum_h M[h]' heads[t, h]`, both over the
pairs whose gate is not 0 (`projection_kernels.py`). When they are faster than dense products is predicted by counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moh.attention.gpu.tiles import FEW, FEW_32_BITS, ProductTile, major_of, padded, product_tile, relative_cost

FEW_TOKENS = 16
"""Up to this many tokens one program has all tokens of a head and reads its weights once, if any token uses it."""

PACK_GATES, PACK_WARPS = 8192, 8
"""Gates per program of the packing: few enough for its registers, many enough that there are few partial counts."""

SUM_COLUMNS = 64
ADD_COLUMNS = 128

MAX_COST = 0.7
"""Use the sparse product up to this part of the dense cost by count; the rest is a margin for Triton being slower than cuBLAS."""

MIN_TILES = 128
"""Below this many tiles, of active pairs or of the weights' gradient, a large GPU is not full, so skipping work saves no time."""

MIN_BYTES = 2**24
"""With few tokens: smaller weights take less time to read than a kernel to launch, so skipping some saves nothing."""


def dense_is_faster(
    *, tokens: int, heads: int, width: int, channels: int, share: float, dtype: torch.dtype, major: int
) -> str | None:
    """Why the dense product is expected to be as fast, or None.

    Args:
        tokens: of all sequences together.
        heads: H.
        width: D, of one head.
        channels: C, of the layer's input or output.
        share: expected share of (token, head) pairs that are active.
        dtype: of weights and inputs.
        major: of the GPU's compute capability.
    """
    # No number of tokens in the reason: torch.compile would specialise on it.
    if dtype.itemsize != 2:
        return f"its {str(dtype).removeprefix('torch.')} tiles are small and meant for checks"
    if tokens <= FEW_TOKENS:
        if heads * width * channels * dtype.itemsize < MIN_BYTES:
            return f"its weights have less than {MIN_BYTES >> 20} MiB, and reading part of them saves too little"
        if 1 - (1 - share) ** tokens > MAX_COST:  # probability that some token uses a head
            return f"all tokens together are expected to use more than {MAX_COST:.0%} of the heads"
        return None
    tile = product_tile(width, dtype.itemsize, major)
    cost = (share + tile.tall / 2 / tokens) * relative_cost(width, major)  # half a tile per head is empty
    if cost > MAX_COST:
        return f"by count it costs more than {MAX_COST} of the dense product"
    if min(tokens * share, channels) * heads * width < MIN_TILES * tile.tall * tile.wide:
        return f"it has fewer than {MIN_TILES} tiles of work, which leave a large GPU idle"
    return None


def expand(x: Tensor, matrix: Tensor, gates: Tensor) -> Tensor:
    """Heads `[T, H, D]` of active pairs, 0 elsewhere, from x `[T, C]`, matrix `[H * D, C]` and gates `[T, H]`.

    Gates only mark the active pairs; they get no gradient.
    """
    gates = gates.detach()
    rows, counts = (None, None) if x.shape[0] <= FEW_TOKENS else triton_pack_op(gates)
    out: Tensor = triton_expand_op(x, matrix, gates, rows, counts)
    return out


def sum_heads(heads: Tensor, matrix: Tensor, gates: Tensor, *, zeroed: bool = False) -> Tensor:
    """The sum `[T, C]` over the active heads `[T, H, D]`, matrix `[H * D, C]` and gates as in `expand`.

    Above `FEW_TOKENS` this is PyTorch's dense product, of heads that are 0 where inactive; its gradients are those of the
    active pairs alone.

    Args:
        zeroed: whether inactive heads are 0 already.
    """
    out: Tensor = triton_sum_heads_op(heads, matrix, gates.detach(), zeroed)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _options(tile: ProductTile, stages: int) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": stages, "PRECISION": _precision()}


def pack_tokens(heads: int) -> int:
    """Tokens per block of the packing."""
    return max(16, PACK_GATES // padded(heads))


def sum_width(width: int, itemsize: int) -> int:
    """Numbers of a head that `sum_heads` multiplies at once; fewer of 32 bits, which take more registers."""
    return min(padded(width), 256 // itemsize)


def _few(x: Tensor) -> ProductTile:
    return FEW_32_BITS if x.element_size() == 4 else FEW


@torch.library.custom_op("moh::triton_pack", mutates_args=())
def triton_pack_op(gates: Tensor) -> tuple[Tensor, Tensor]:
    """(each head's tokens, the active ones first, in order, int32 `[H, T]`; how many are active, int32 `[H]`)."""
    from moh.attention.gpu.projection_kernels import count_kernel, pack_kernel

    T, H = gates.shape
    rows, counts = _packed_shapes(gates)
    if T == 0:
        return rows, counts.zero_()
    tokens = pack_tokens(H)
    blocks = -(-T // tokens)
    options = {"H": H, "BLOCK_H": padded(H), "BLOCK_T": tokens, "num_warps": PACK_WARPS}
    if H:
        parts = gates.new_empty(blocks, H, dtype=torch.int32)
        with torch.cuda.device_of(gates):  # Triton launches on the current device, wherever the tensors are
            count_kernel[(blocks,)](gates, parts, *gates.stride(), T, **options)
            pack_kernel[(blocks,)](gates, parts, rows, counts, *gates.stride(), T, **options)
    return rows, counts


@triton_pack_op.register_fake
def _packed_shapes(gates: Tensor) -> tuple[Tensor, Tensor]:
    T, H = gates.shape
    return gates.new_empty(H, T, dtype=torch.int32), gates.new_empty(H, dtype=torch.int32)


@torch.library.custom_op("moh::triton_expand", mutates_args=())
def triton_expand_op(x: Tensor, matrix: Tensor, gates: Tensor, rows: Tensor | None, counts: Tensor | None) -> Tensor:
    """Heads `[T, H, D]`, contiguous; without `rows` and `counts` the kernel finds active pairs by their gates."""
    from moh.attention.gpu.projection_kernels import expand_kernel

    (T, C), H = x.shape, gates.shape[1]
    D = matrix.shape[0] // H
    x = _aligned(x)
    out = x.new_empty(T, H, D)
    tile = _few(x) if rows is None else product_tile(D, x.element_size(), major_of(x.device))
    programs = -(-T // tile.tall) * H * -(-D // tile.wide)
    if programs:
        with torch.cuda.device_of(x):
            expand_kernel[(programs,)](
                x, matrix, gates, gates if rows is None else rows, gates if counts is None else counts, out,
                x.stride(0), *matrix.stride(), *gates.stride(), T, C, H=H, D=D, BLOCK_M=tile.tall, BLOCK_D=tile.wide,
                BLOCK_C=tile.inner, PACKED=rows is not None, WHOLE=C % tile.inner == 0 and D % tile.wide == 0,
                **_options(tile, tile.stages),
            )  # fmt: skip
    return out


@torch.library.custom_op("moh::triton_sum_heads", mutates_args=())
def triton_sum_heads_op(heads: Tensor, matrix: Tensor, gates: Tensor, zeroed: bool) -> Tensor:
    """The sum `[T, C]`, contiguous."""
    from moh.attention.gpu.projection_kernels import add_parts_kernel, sum_heads_kernel

    T, H, D = heads.shape
    C = matrix.shape[1]
    if T > FEW_TOKENS or min(heads.shape) == 0 or C == 0:
        used = heads if zeroed else torch.where((gates != 0)[..., None], heads, 0)
        return used.flatten(1) @ matrix
    heads = _aligned(heads)
    out, parts = heads.new_empty(T, C), heads.new_empty(H, T, C, dtype=torch.float32)
    with torch.cuda.device_of(heads):
        sum_heads_kernel[(H * -(-C // SUM_COLUMNS),)](
            heads, matrix, gates, parts, *heads.stride()[:2], *matrix.stride(), *gates.stride(), T, C, H=H, D=D,
            BLOCK_T=FEW_TOKENS, BLOCK_D=sum_width(D, heads.element_size()), BLOCK_C=SUM_COLUMNS, PRECISION=_precision(),
            num_warps=4,
        )  # fmt: skip
        add_parts_kernel[(T * -(-C // ADD_COLUMNS),)](
            parts, gates, out, *gates.stride(), T, C, H=H, BLOCK_H=padded(H), BLOCK_C=ADD_COLUMNS, num_warps=4
        )
    return out


@torch.library.custom_op("moh::triton_outer", mutates_args=())
def triton_outer_op(heads: Tensor, x: Tensor, gates: Tensor, rows: Tensor, counts: Tensor, columns: bool) -> Tensor:
    """`[H * D, C]`: the sum over each head's active tokens of `heads[t, h] x[t]'`; with `columns`, column-major."""
    from moh.attention.gpu.projection_kernels import outer_kernel

    (T, H, D), C = heads.shape, x.shape[1]
    heads, x = _aligned(heads), _aligned(x)
    out = x.new_empty(C, H * D).t() if columns else x.new_empty(H * D, C)
    tile = product_tile(D, x.element_size(), major_of(x.device))
    programs = -(-C // tile.tall) * H * -(-D // tile.wide)
    if programs:
        with torch.cuda.device_of(x):
            outer_kernel[(programs,)](
                heads, x, rows, counts, out, *heads.stride()[:2], x.stride(0), *out.stride(), T, C, H=H, D=D,
                BLOCK_M=tile.inner, BLOCK_D=tile.wide, BLOCK_C=tile.tall,
                WHOLE=C % tile.tall == 0 and D % tile.wide == 0, **_options(tile, tile.chained_stages),
            )  # fmt: skip
    return out


@triton_expand_op.register_fake
def _(x: Tensor, matrix: Tensor, gates: Tensor, rows: Tensor | None, counts: Tensor | None) -> Tensor:
    return x.new_empty(*gates.shape, matrix.shape[0] // gates.shape[1])


@triton_sum_heads_op.register_fake
def _(heads: Tensor, matrix: Tensor, gates: Tensor, zeroed: bool) -> Tensor:
    return heads.new_empty(heads.shape[0], matrix.shape[1])


@triton_outer_op.register_fake
def _(heads: Tensor, x: Tensor, gates: Tensor, rows: Tensor, counts: Tensor, columns: bool) -> Tensor:
    rows_out, C = heads.shape[1] * heads.shape[2], x.shape[1]
    return x.new_empty(C, rows_out).t() if columns else x.new_empty(rows_out, C)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(x for x in inputs if not isinstance(x, bool)))


def _is_columns(matrix: Tensor) -> bool:
    """Whether its gradient should be column-major too, so that nothing copies it."""
    return matrix.stride(0) == 1 and matrix.stride(1) > 1


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, matrix, gates, rows, counts = ctx.saved_tensors
    grad_x = triton_sum_heads_op(grad, matrix, gates, False) if ctx.needs_input_grad[0] else None
    grad_matrix = None
    if ctx.needs_input_grad[1]:
        rows, counts = triton_pack_op(gates) if rows is None else (rows, counts)
        grad_matrix = triton_outer_op(grad, x, gates, rows, counts, _is_columns(matrix))
    return grad_x, grad_matrix, None, None, None


def _sum_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    heads, matrix, gates = ctx.saved_tensors
    rows, counts = triton_pack_op(gates)
    grad_heads = triton_expand_op(grad, matrix, gates, rows, counts) if ctx.needs_input_grad[0] else None
    grad_matrix = None
    if ctx.needs_input_grad[1]:
        grad_matrix = triton_outer_op(heads, grad, gates, rows, counts, _is_columns(matrix))
    return grad_heads, grad_matrix, None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    heads, x, gates, rows, counts = ctx.saved_tensors
    grad_heads = triton_expand_op(x, grad, gates, rows, counts) if ctx.needs_input_grad[0] else None
    grad_x = triton_sum_heads_op(heads, grad, gates, False) if ctx.needs_input_grad[1] else None
    return grad_heads, grad_x, None, None, None, None


triton_expand_op.register_autograd(_expand_backward, setup_context=_save)
triton_sum_heads_op.register_autograd(_sum_heads_backward, setup_context=_save)
triton_outer_op.register_autograd(_outer_backward, setup_context=_save)
