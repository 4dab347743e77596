"""Inspection: which head did what. Head load per layer, and per class of images (extra `vision`), as a table and a picture.

Pictures are in `plots` and `class_plots` (extra `llm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moh.inspection.load import HeadLoad, head_load

if TYPE_CHECKING:
    from moh.inspection.class_load import ClassHeadLoad, class_head_load

__all__ = ["ClassHeadLoad", "HeadLoad", "class_head_load", "head_load"]


def __getattr__(name: str) -> Any:
    if name in ("ClassHeadLoad", "class_head_load"):
        from moh.inspection import class_load

        return getattr(class_load, name)
    raise AttributeError(f"module 'moh.inspection' has no attribute {name!r}")
