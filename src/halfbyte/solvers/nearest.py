"""Round every weight to the nearest level of a grid fitted to it."""

from jaxtyping import Float
from torch import Tensor

from halfbyte.grids.grid import Grid, Quantized
from halfbyte.solvers.gptq import prominence
from halfbyte.solvers.statistics import Diagonal, Statistics


def nearest(
    w: Float[Tensor, "out in"], grid: Grid, statistics: Statistics | Diagonal | None = None, search: bool = True
) -> Quantized:
    """With `search`, scales minimise the squared error, weighted by the importance of in-features if statistics are given."""
    importance = statistics.importance if statistics else None
    counts = prominence(w).mul_(importance) if importance is not None and grid.prominent else importance
    params = grid.fit(w, counts, search)
    return Quantized(grid, grid.encode(w, params, importance), params)
