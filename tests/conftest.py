"""Shapes in signatures are checked while tests run."""

from jaxtyping import install_import_hook

install_import_hook(["halfbyte.grids", "halfbyte.solvers", "halfbyte.containers", "halfbyte.evaluate"], "beartype.beartype")
