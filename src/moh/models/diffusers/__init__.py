"""MoH-DiT: class-conditional diffusion transformers with Mixture-of-Head attention, as diffusers models (extra `diffusion`).

Sizes by name: `create_dit("moh_dit_s_2_75")`, `DIT_NAMES`. Dense ones (`dit_s_2`) are the controls: no router at all.
"""

from moh._extras import require

require("diffusers", extra="diffusion")

# A saved pipeline looks up a class's base class in the same module.
from diffusers import ModelMixin as ModelMixin

from moh.models.diffusers.dit import MoHDiTTransformer2DModel
from moh.models.diffusers.guidance import guided_output
from moh.models.diffusers.presets import DIT_NAMES, create_dit

# diffusers' pipelines save a class's module to import it again, but take one that ends in `.dit.<file>` for their own
# pipeline package `dit`.
MoHDiTTransformer2DModel.__module__ = __name__

__all__ = ["DIT_NAMES", "MoHDiTTransformer2DModel", "create_dit", "guided_output"]
