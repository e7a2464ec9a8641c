"""Which level of its grid each weight becomes. To add a solver: one file, and one line here."""

from collections.abc import Callable
from functools import partial

from halfbyte.grids.quantized import Quantized
from halfbyte.solvers.gptq import gptaq, gptq
from halfbyte.solvers.nearest import nearest

Solver = Callable[..., Quantized]
"""(w [out, in], grid, statistics or None) -> Quantized"""

SOLVERS: dict[str, Solver] = {
    "nearest": nearest,
    "minmax": partial(nearest, search=False),
    "gptq": gptq,
    "gptaq": gptaq,
}
