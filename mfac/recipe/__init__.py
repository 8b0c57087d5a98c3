"""Recipes in SparseML's format: read one, bind it to a model and an optimizer, step it along with training."""

from mfac.recipe.document import Item
from mfac.recipe.load import Recipe, load_recipe
from mfac.recipe.manager import Manager, Session

__all__ = ["Item", "Manager", "Recipe", "Session", "load_recipe"]
