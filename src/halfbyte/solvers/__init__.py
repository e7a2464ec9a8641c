"""Which level of its grid each weight becomes. To add a solver, or a refinement of matrices: one file,
and one line here."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from halfbyte.grids.grid import Grid
from halfbyte.grids.quantized import Quantized
from halfbyte.solvers.descent import descend
from halfbyte.solvers.gptq import aimed, gptaq, gptq
from halfbyte.solvers.nearest import nearest
from halfbyte.solvers.outputs import OutputHessian
from halfbyte.solvers.statistics import Statistics

Solver = Callable[..., Quantized]
"""(w [out, in], grid, statistics or None) -> Quantized"""

SOLVERS: dict[str, Solver] = {
    "nearest": nearest,
    "minmax": partial(nearest, search=False),
    "gptq": gptq,
    "gptaq": gptaq,
}
TARGETS: dict[str, Callable[[Tensor, Statistics], Tensor]] = {"gptaq": aimed}
"""What a solver rounds where that is not the weight itself."""
REFINEMENTS: dict[str, Callable[[Tensor, Quantized, Statistics], Quantized]] = {"descent": descend}
"""What is done to a matrix once it is rounded, by what it reads; by their names in `Method.refinements`."""


def solved(
    solver: str,
    refinements: Iterable[str],
    w: Tensor,
    grid: Grid,
    statistics: Statistics,
    outputs: OutputHessian | None = None,
) -> Quantized:
    """What a solver, and those of the refinements that see one matrix, make of it."""
    q = SOLVERS[solver](w, grid, statistics, *([] if outputs is None else [outputs]))
    for refine in (REFINEMENTS[name] for name in refinements if name in REFINEMENTS):
        target = TARGETS[solver](w, statistics) if solver in TARGETS else w
        q = refine(target, q, statistics)
    return q
