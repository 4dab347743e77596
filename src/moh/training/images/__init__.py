"""Training image classifiers: the recipe, the model, the trainer, the run (extra `vision`).

`moh.training.train` runs a recipe; `run` holds what it returns.
"""

from moh._extras import require

require("torchvision", extra="vision")
require("timm", extra="vision")

from moh.training.images.recipe import ImageRecipe

__all__ = ["ImageRecipe"]
