"""GPTQ (Frantar et al., 2210.17323): round in-features one after another, each making up for the errors before it.

With the Hessian factored as H = U D U^T, U unit upper triangular, the squared output error is that of

    e_k + sum_{j<k} e_j U[j, k],   weighted by D[k],   where e = w - rounded,

so column k is best rounded from w_k + sum_{j<k} e_j U[j, k]. This is the paper's update (Chee et al., 2307.13304,
theorem 6) with one Cholesky factorisation where the usual form takes two and an inverse.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.grids.grid import Grid, Quantized
from halfbyte.solvers.statistics import Statistics

LAZY = 128  # in-features per block: feedback from outside a block is one matrix product


def gptq(w: Float[Tensor, "out in"], grid: Grid, statistics: Statistics) -> Quantized:
    """Parameters are fitted once to the whole matrix; then columns of high importance go first. Needs no g_idx."""
    params = grid.fit(w, statistics.importance)
    order, factor = statistics.factor(grid.step)
    target = w.float().T[order]
    error = torch.zeros_like(target)
    codes = torch.empty(w.shape[::-1], dtype=torch.uint8, device=w.device)
    for last in range(len(order), 0, -LAZY):
        first = max(last - LAZY, 0)
        wanted = target[first:last] + factor[last:, first:last].T @ error[last:]
        for k in range(last - 1, first - 1, -1):
            column = wanted[k - first] + factor[k + 1 : last, k] @ error[k + 1 : last]
            code, value = grid.round(column[:, None], params, int(order[k]))
            codes[order[k]] = code[:, 0]
            error[k] = target[k] - value[:, 0]
    return Quantized(grid, codes.T.contiguous(), params)
