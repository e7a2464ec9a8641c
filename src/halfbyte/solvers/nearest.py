"""Round every weight to the nearest level of a grid fitted to it."""

from jaxtyping import Float
from torch import Tensor

from halfbyte.grids.grid import Grid
from halfbyte.grids.quantized import Quantized
from halfbyte.solvers.gptq import magnitude_weights
from halfbyte.solvers.statistics import Diagonal, Statistics


def nearest(
    w: Float[Tensor, "out in"], grid: Grid, statistics: Statistics | Diagonal | None = None, search: bool = True
) -> Quantized:
    """With `search`, scales minimise the squared error, weighted by the importance of in-features if statistics are
    given."""
    importance = statistics.importance if statistics else None
    counts = magnitude_weights(w).mul_(importance) if importance is not None and grid.weighs_magnitude else importance
    params = grid.fit(w, counts, search)
    return Quantized(grid, grid.encode(w, params, importance), params)
