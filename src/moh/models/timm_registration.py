"""Make timm know our models as soon as both packages are imported, in either order, without importing timm.

Each package registers its models with timm's own decorator when it is imported; this only decides when that is.
"""

from __future__ import annotations

import importlib
import warnings

from moh._import_hooks import when_imported

_PACKAGES = ("moh.models.transnext", "moh.models.vit")
"""Packages whose import registers models."""


def register_with_timm() -> None:
    """Register now if timm's models are imported, else as soon as they are."""
    when_imported("timm.models", _import_packages)


def _import_packages() -> None:
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:  # an older timm than ours needs: it should still serve its own models
            warnings.warn(
                f"the models of {package} are not registered with timm: {error}", RuntimeWarning, stacklevel=2
            )
