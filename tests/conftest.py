"""Shapes in signatures are checked while tests run."""

from jaxtyping import install_import_hook

# Module by module: the checks wrap functions, and those of grids/rounding_numba.py are compiled.
GRIDS = ["halfbyte.grids.grid", "halfbyte.grids.rounding", "halfbyte.grids.scalar"]
install_import_hook([*GRIDS, "halfbyte.solvers", "halfbyte.containers", "halfbyte.evaluation"], "beartype.beartype")
