"""Names of a package that are imported when they are first used (PEP 562), so that importing it stays cheap.

The package also imports them under `TYPE_CHECKING`, which is what type checkers and editors read.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moh._extras import require


def lazy(
    package: str, homes: Mapping[str, str], *, extras: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its name, as in `sys.modules`.
        homes: name -> the module that defines it; for a submodule, the submodule itself (`package.name`).
        extras: module of `homes` -> the package that it needs, and that package's extra.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] in extras:
            needed, extra = extras[homes[name]]
            require(needed, extra=extra)
        module = importlib.import_module(homes[name])
        value = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next look-up is an ordinary one
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
