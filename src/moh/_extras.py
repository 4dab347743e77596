"""Import an optional dependency, or name the extra to install.

Lower bounds of the versions are in pyproject.toml.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module` or raise an ImportError that names its extra.

    Raises:
        ImportError: the module, or the package it belongs to, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its own dependencies is missing
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'mixture-of-heads[{extra}]'"
        ) from error
