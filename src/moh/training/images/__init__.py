"""Training image classifiers: recipes, data sets, augmentation, the run (extra `vision`).

Importing this imports no extra. `moh.training.train` runs a recipe; `run` holds what it returns.
"""

from moh.training.images.recipe import ImageRecipe

__all__ = ["ImageRecipe"]
