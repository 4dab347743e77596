"""What the layers of the dense model see of calibration data: by running it, or read from a file where it ran before."""

from __future__ import annotations

import ctypes
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moh._modes import evaluating
from moh.conversion.dense import DenseAttention, DenseModel, check_finite

LARGE_BYTES = 1 << 20
"""Inputs of blocks from this size on are kept in a file until the backward pass."""


def run(
    dense: DenseModel,
    batches: Batches,
    add: Callable[[int, Tensor, Tensor], None],
    layers: Collection[int] | None = None,
) -> None:
    """Forward passes in evaluation mode; `add(layer, x [T, C], z [T, H*D])` after each layer's attention.

    Args:
        layers: the only ones that `add` is for, so that a recording need not read the others; None for all.
    """
    if isinstance(batches, Playback):
        batches.play(dense, add, layers)
        return

    def see(index: int, x: Tensor, z: Tensor) -> None:
        add(index, x.flatten(0, -2), z.flatten(0, -2))

    with torch.no_grad(), evaluating(dense.model), tapped(dense.attentions, see):
        for batch in batches:
            output = dense.run(batch)
            if output is not None:
                check_finite(output, f"layer {len(dense.attentions) - 1} gives")


def give_back_memory() -> None:
    """Return freed memory to the system, of which glibc would keep more than a small model has (Linux)."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return trim


class Kept(NamedTuple):
    """A tensor in a `TensorFile`."""

    place: int  # of its first byte
    dtype: torch.dtype
    shape: torch.Size


class TensorFile:
    """A stack of tensors in a temporary file, which goes with this object.

    Attributes:
        size: bytes in use; the next tensor is written behind them.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this object)
        self.size = 0

    def write(self, tensor: Tensor) -> Kept:
        """Where `tensor` is kept.

        Raises:
            OSError: the disk is full; what was written before is as it was.
        """
        kept = Kept(self.size, tensor.dtype, tensor.shape)
        self._file.seek(self.size)
        self.size += self._file.write(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return kept

    def read(self, kept: Kept) -> Tensor:
        """A copy in the CPU's memory."""
        buffer = bytearray(kept.shape.numel() * kept.dtype.itemsize)
        self._file.seek(kept.place)
        self._file.readinto(buffer)
        return torch.frombuffer(buffer, dtype=kept.dtype).view(kept.shape)


class Recording:
    """What every layer sees of the calibration data, kept in a temporary file: the model runs once, whatever is summed up.

    If the disk has no room for twice as much, nothing is kept and the model runs again for each pass.

    Args:
        batches: all calibration data, as the model reads it.
    """

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self._file = TensorFile()
        self._kept: dict[int, list[Kept]] = {}  # batch -> x and z of each layer

    def run(
        self,
        index: int,
        dense: DenseModel,
        add: Callable[[int, Tensor, Tensor], None],
        layers: Collection[int] | None,
    ) -> None:
        """One batch: by the model the first time, then from the file; arguments as of the function `run`."""
        if index in self._kept:
            kept = self._kept[index]
            for layer in range(len(kept) // 2):
                if layers is None or layer in layers:
                    device = dense.attentions[layer].device
                    add(layer, *(self._file.read(one).to(device) for one in kept[2 * layer : 2 * layer + 2]))
            return
        kept = []
        has_room = self._has_room()

        def see(layer: int, x: Tensor, z: Tensor) -> None:
            kept.extend((self._file.write(x), self._file.write(z)) if has_room else ())
            add(layer, x, z)

        run(dense, iter([self.batches[index]]), see)
        if has_room:
            self._kept[index] = kept

    def _has_room(self) -> bool:
        sizes = [batch.numel() for batch in self.batches]  # of which what is recorded is a multiple
        done = sum(sizes[index] for index in self._kept)
        return shutil.disk_usage(tempfile.gettempdir()).free > 2 * self._file.size * (sum(sizes) - done) // max(1, done)


@dataclass
class Playback:
    """One pass over a recording, in place of batches.

    Attributes:
        recording: of all calibration data.
        order: the batches of this pass.
        rows: of each of these batches, the samples that count; None for all.
    """

    recording: Recording
    order: Iterable[int]
    rows: Mapping[int, Sequence[int]] | None = None

    def play(
        self, dense: DenseModel, add: Callable[[int, Tensor, Tensor], None], layers: Collection[int] | None = None
    ) -> None:
        """Call `add` for each batch and layer, as `run` does."""
        for index in self.order:
            rows, count = None if self.rows is None else list(self.rows[index]), len(self.recording.batches[index])

            def add_rows(layer: int, x: Tensor, z: Tensor, rows: Any = rows, count: int = count) -> None:
                if rows is not None:
                    x, z = (tensor.unflatten(0, (count, -1))[rows].flatten(0, 1) for tensor in (x, z))
                add(layer, x, z)

            self.recording.run(index, dense, add_rows, layers)
            give_back_memory()


Batches = Iterator[Tensor] | Playback
"""What a pass reads: batches that the model runs on, or a recording of what its layers saw."""


@contextmanager
def tapped(attentions: Sequence[DenseAttention], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, x, z)` in each layer: its input `[B, N, C]` and its heads, concatenated, `[B, N, H*D]`.

    Raises:
        ValueError: one of them is not finite, when the model runs.
    """
    inputs: dict[int, Tensor] = {}
    handles = []
    for index, attention in enumerate(attentions):

        def see_input(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            check_finite(args[0], f"layer {index - 1} gives layer {index}" if index else "layer 0 is given")
            inputs[index] = args[0]

        def see_heads(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            check_finite(args[0], f"the attention of layer {index} gives")
            see(index, inputs.pop(index), args[0])

        handles.append(attention.entry.register_forward_pre_hook(see_input))
        handles.append(attention.output.register_forward_pre_hook(see_heads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[Callable[[], bool]]:
    """A graph through `blocks` keeps the input of each alone; the backward pass runs them again, whole and one at a time.

    On the CPU large inputs are kept in a temporary file, if the disk has room: of a long text they would take as much
    memory as a small model.

    Yields:
        whether a block is being run again, for hooks inside it that must count once.
    """
    again, file = False, TensorFile()

    def pack(tensor: Tensor) -> Tensor | Kept:
        if tensor.device.type != "cpu" or tensor.nbytes < LARGE_BYTES:
            return tensor
        try:
            return file.write(tensor)
        except OSError:
            return tensor

    def unpack(kept: Tensor | Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        file.size = min(file.size, kept.place)  # the backward pass goes from the last to the first
        return file.read(kept)

    @contextmanager
    def running_again() -> Iterator[None]:
        nonlocal again
        again = True
        try:
            yield
        finally:
            again = False

    def checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_block(*args: Any, **options: Any) -> Any:
            with saved_tensors_hooks(pack, unpack):
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False,
                                  context_fn=lambda: (nullcontext(), running_again()), **options)  # fmt: skip

        return run_block

    # without the early stop a block runs to its end, past every hook inside it
    with replaced_forwards(blocks, checkpointing), set_checkpoint_early_stop(False):
        yield lambda: again


@contextmanager
def replaced_forwards(
    blocks: Iterable[nn.Module], replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """For the block, the forward methods of modules are what `replacement` makes of them; one given twice is replaced once."""
    former = []
    try:
        for block in dict.fromkeys(blocks):
            replaced = replacement(block.forward)
            former.append((block, vars(block).get("forward")))  # its own where accelerate has put hooks on it
            block.forward = replaced
        yield
    finally:
        for block, own in former:
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own
