"""Inspection: which head did what, for any model, MoH or dense, and any groups of inputs: tables, tests, ablation.

Groups of images need the extra `vision`, those of a diffusion model `diffusion`, pictures `llm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moh._lazy import lazy
from moh.inspection.ablation import HeadAblation, ablate_heads
from moh.inspection.groups import HeadUse, InputSample, LayerHeads, inspect_groups
from moh.inspection.inputs import GroupBatch, GroupedInputs, text_groups, token_groups
from moh.inspection.similarity import HeadSimilarity, head_similarity
from moh.inspection.statistics import (
    distance_rows,
    layer_rows,
    load_distance,
    load_entropy,
    pair_tests,
    permutation_test,
    score_variation,
    specialised_heads,
    unusual_heads,
)

if TYPE_CHECKING:
    from moh.inspection.diffusion import diffusion_groups
    from moh.inspection.images import image_groups

__all__ = [
    "GroupBatch",
    "GroupedInputs",
    "HeadAblation",
    "HeadSimilarity",
    "HeadUse",
    "InputSample",
    "LayerHeads",
    "ablate_heads",
    "diffusion_groups",
    "distance_rows",
    "head_similarity",
    "image_groups",
    "inspect_groups",
    "layer_rows",
    "load_distance",
    "load_entropy",
    "pair_tests",
    "permutation_test",
    "score_variation",
    "specialised_heads",
    "text_groups",
    "token_groups",
    "unusual_heads",
]

__getattr__, __dir__ = lazy(
    __name__,
    {"diffusion_groups": "moh.inspection.diffusion", "image_groups": "moh.inspection.images"},
    extras={"moh.inspection.diffusion": ("diffusers", "diffusion")},
)
