"""What was read of modules for one token, remembered for the next ones while the modules stay as they are.

Looking through the projections, norms and router of a layer takes longer than its attention's arithmetic for one token. They
seldom change, but may at any time (`model.to`, hooks, adapters, the dial), so every token asks whether they have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moh.attention.projections import is_symmetric, is_wrapper

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_NAME = "_moh_remembered"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_parameters", "_buffers", "_modules")


class Remembered:
    """A module's place for what was read of it; copies of the module, and one that is loaded, read again.

    Weights that were replaced stay in memory until the next token is decoded on the CPU.
    """

    def __init__(self, owner: nn.Module | None = None) -> None:
        self.kept: tuple[Any, _Unchanged] | None = None
        self._owner = None if owner is None else weakref.ref(owner)

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is the module's own: a shallow copy has that of the module it was made from."""
        return self._owner is not None and self._owner() is module

    def __deepcopy__(self, memo: object) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def remembered(
    module: M, x: Tensor, read: Callable[[M, Tensor], T | None], modules: Callable[[M], Iterable[nn.Module]]
) -> T | None:
    """`read(module, x)`, or what it gave before, if it would give the same.

    Args:
        module: what remembers.
        x: on the CPU; only its dtype counts.
        read: None is not remembered.
        modules: `modules(module)` are all modules that `read` looks at; asked after it.
    """
    place: Remembered | None = vars(module).get(_NAME)
    if place is None or not place.is_of(module):
        place = vars(module)[_NAME] = Remembered(module)
    kept = place.kept
    if kept is not None and kept[1].holds(x):
        return kept[0]  # type: ignore[no-any-return]
    value = read(module, x)
    place.kept = None if value is None else (value, _Unchanged(modules(module), x))
    return value


class _Unchanged:
    """Whether modules have the same class, attributes, parts and weights as now, and hooks where they have some; x is on the CPU.

    What is read depends on whether a module has hooks, not on which. Not all of a module's dictionaries are compared: that
    alone would take as long as a layer's other calls.
    """

    def __init__(self, modules: Iterable[nn.Module], x: Tensor) -> None:
        self._dtype = x.dtype
        self._types = [(module, type(module)) for module in modules]
        self._sizes = [
            (vars(module), len(vars(module))) for module, _ in self._types
        ]  # a patched `forward` is one more
        hooks: list[Any] = []
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        for module, _ in self._types:
            own = vars(module)
            hooks += (own[name] for name in _HOOKS)
            self._entries += ((own, n, v) for n, v in own.items() if n in _PARTS + _HOOKS or not n.startswith("_"))
            self._entries += ((own[part], name, value) for part in _PARTS for name, value in own[part].items())
        self._hooked, self._without_hooks = [h for h in hooks if h], [h for h in hooks if not h]
        kept = [own for module, _ in self._types for own in (module._parameters, module._buffers)]
        tensors = [tensor for own in kept for tensor in own.values() if tensor is not None]
        self._wrappers = [tensor for tensor in tensors if is_wrapper(tensor)]
        # `model.to` and `p.data = ...` change them in place; a wrapper has no memory of its own
        self._tensors = [(p, p.dtype, None if is_wrapper(p) else p.data_ptr()) for p in tensors]
        self._entries += ((vars(p), name, value) for p in self._wrappers for name, value in vars(p).items())

    def holds(self, x: Tensor) -> bool:
        """Whether they have, for an x of the same dtype."""
        if x.dtype is not self._dtype or any(self._without_hooks) or _has_any_global_hook():
            return False
        if not all(self._hooked):
            return False
        for contents, name, value in self._entries:
            if contents.get(name) is not value:
                return False
        for contents, size in self._sizes:
            if len(contents) != size:
                return False
        for module, kind in self._types:
            if type(module) is not kind:
                return False
        for tensor, dtype, memory in self._tensors:
            if tensor.dtype is not dtype or not tensor.is_cpu or (memory is not None and tensor.data_ptr() != memory):
                return False
        return not self._wrappers or all(map(is_symmetric, self._wrappers))
