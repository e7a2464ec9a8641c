"""Whether a target has a use for what a recipe says."""

from collections.abc import Iterable

from halfbyte import grids
from halfbyte.errors import BadRequest, UnknownName, Unsupported
from halfbyte.formats import ALIASES
from halfbyte.recipe import Recipe
from halfbyte.targets.table import TARGETS
from halfbyte.targets.target import Target
from halfbyte.words import unknown_grid

OF_SOME = ("pure", "pre")
"""Entries of a recipe that mean something to some targets alone."""


def completed(recipe: Recipe, target: Target) -> Recipe:
    """With what the target implies. Raises BadRequest for what it has no use for."""
    for word in OF_SOME:
        if getattr(recipe, word) and word not in target.recipe_fields:
            taker = next(other for other in TARGETS.values() if word in other.recipe_fields)
            raise BadRequest(
                f"{word} is for {taker.title}, and this is to be {target.name}; leave it out, "
                f"or write one with --to {taker.name}"
            )
    implied = {"grid": target.default_grid} if target.default_grid and "grid" not in recipe.model_fields_set else {}
    return recipe.model_copy(update={"to": target.name, **implied})


def require_known(target: Target, grid: str, overrides: Iterable[str] = ()) -> None:
    """Raise, saying what is most likely meant, for names that the target has no grid for."""
    for name, mixture in ((grid, True), *((scheme, False) for scheme in overrides if scheme != "keep")):
        is_grid = name in grids.GRIDS or name in ALIASES or target.has_presets
        owner = None if is_grid else next((other for other in TARGETS.values() if other.prefers(name, None)), None)
        if owner:
            raise Unsupported(
                f"'{name}' is a preset of {owner.title}, where tensors have several types; "
                f"write one with --to {owner.name}, or name one grid, such as int4-g128"
            )
        try:
            target.require_name(name, mixture)
        except UnknownName as error:
            raise (error if "/" in name else unknown_grid(name, target.name)) from None
