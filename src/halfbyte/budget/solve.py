"""One option for each unit, so that the sum of losses is least within bytes, or the sum of bytes within a loss."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-5
"""A solution may be so much worse than the best, as a share of it."""
SECONDS = 120


class Option(NamedTuple):
    """A grid for a unit."""

    size_bytes: int
    loss: float


def choose(
    units: Sequence[Mapping[str, Option]], most_bytes: int | None = None, most_loss: float | None = None
) -> list[str] | None:
    """The name of the option of each unit: least loss within `most_bytes`, or fewest bytes within `most_loss`. None
    where nothing is within."""
    undominated = [_frontier(unit) for unit in units]
    names = [(number, name) for number, unit in enumerate(undominated) for name in unit]
    options = [undominated[number][name] for number, name in names]
    sizes, losses = np.array([o.size_bytes for o in options], float), np.array([o.loss for o in options], float)
    wanted, limited, limit = (losses, sizes, most_bytes) if most_bytes is not None else (sizes, losses, most_loss)
    if limit is None:
        raise ValueError("nothing limits what is chosen")
    if sum(min(limited[i] for i, (n, _) in enumerate(names) if n == u) for u in range(len(units))) > limit:
        return None
    unit_of = csr_array((np.ones(len(names)), ([number for number, _ in names], range(len(names)))))
    result = milp(
        wanted / max(wanted.max(), 1e-300),
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(unit_of, 1, 1),
            LinearConstraint((limited / limit).reshape(1, -1), -np.inf, 1),
        ],
        # With presolving, HiGHS prints a line of its own where a limit of losses is close to what a choice loses.
        options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": most_loss is None},
    )
    if result.x is None:
        raise RuntimeError(f"the solver found nothing: {result.message}")
    return [name for (_, name), taken in zip(names, result.x, strict=True) if taken > 0.5]


def _frontier(unit: Mapping[str, Option]) -> dict[str, Option]:
    """Options than which none is smaller and loses less."""
    frontier: dict[str, Option] = {}
    least = float("inf")
    for name, option in sorted(unit.items(), key=lambda item: item[1]):
        if option.loss < least:
            frontier[name] = option
            least = option.loss
    return frontier
