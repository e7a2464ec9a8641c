"""GPTQ (Frantar et al., 2210.17323): round in-features one after another, each making up for the errors before it.

With the Hessian factored as L' L'^T, L = L' / diag(L') unit lower triangular, the squared output error is the sum over
k of

    (e_k + sum_{j>k} e_j L[j, k])^2 * L'[k, k]^2,   where e = w - rounded,

so, from the last column to the first, column k is best rounded from w_k + sum_{j>k} e_j L[j, k]. This is the paper's
update (Chee et al., 2307.13304, theorem 6) with one Cholesky factorisation where the usual form takes two and an
inverse.
"""

import torch
from jaxtyping import BFloat16, Float, Float32, UInt8
from torch import Tensor

from halfbyte.grids.grid import Grid, Params, Rounder
from halfbyte.grids.quantized import Quantized
from halfbyte.solvers.outputs import OutputHessian
from halfbyte.solvers.statistics import Statistics

ALPHA = 0.5
LAZY = 128
"""In-features per block: what a block makes up for outside of itself is one matrix product."""


def gptq(
    w: Float[Tensor, "out in"], grid: Grid, statistics: Statistics, outputs: OutputHessian | None = None
) -> Quantized:
    """Parameters are fitted once to the whole matrix; then columns of high importance go first. Needs no g_idx.

    They are fitted for what an error costs when the columns after it make up for it, not when all stay as they are (KL
    on bookworm-6m .0306 in place of .0321 with int3-g128-asym, .214 of .222 with int2-g128-asym), and more for large
    weights: least squares would rather clip them, all in the same direction (.0287 and .165). With `outputs`, rows make
    up for the errors of one another too.
    """
    params = grid.fit(w, magnitude_weights(w).mul_(statistics.conditional_variance(grid.vector_size)))
    return Quantized(grid, solve(w, grid, params, statistics, outputs), params)


def magnitude_weights(w: Float[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
    """How much more an error in a large weight counts than in a small one: as in llama.cpp's fitting with an importance
    matrix."""
    squares = w.to(torch.float32, copy=True).square_()
    return squares.add_(squares.mean(1, keepdim=True)).sqrt_()


def gptaq(
    w: Float[Tensor, "out in"], grid: Grid, statistics: Statistics, outputs: OutputHessian | None = None
) -> Quantized:
    """GPTQ with a target that makes up for what the blocks before have changed (Li et al., 2504.02692).

    Half of the correction: on bookworm-6m the whole of it fits the calibration text too well (int3-g128-asym, KL .0323
    without, .0291 at a half, .0305 at the whole).
    """
    return gptq(aimed(w, statistics), grid, statistics, outputs)


def aimed(w: Float[Tensor, "out in"], statistics: Statistics) -> Float32[Tensor, "out in"]:
    """What `gptaq` rounds in place of a weight."""
    return statistics.asymmetric_target(w, ALPHA)


def solve(
    w: Float[Tensor, "out in"],
    grid: Grid,
    params: Params,
    statistics: Statistics,
    outputs: OutputHessian | None = None,
) -> UInt8[Tensor, "out in"]:
    """The codes that GPTQ chooses once the parameters are fixed."""
    factors, shape = statistics.factor(grid.vector_size), tuple(w.shape)
    ordered = w.index_select(1, factors[0])
    if outputs is None:
        return _rounded(ordered, None, grid.rounder(params, shape), *factors)[0]
    missed = torch.zeros(shape, dtype=torch.bfloat16, device=w.device)
    codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
    for step in outputs.steps(w.device):
        rows, owed = step.rows, step.owed(missed)
        codes[rows], left = _rounded(ordered[rows], owed, grid.rounder(params, shape, rows), *factors)
        missed[rows] = (left - owed).bfloat16()
    return codes


def _rounded(
    ordered: Float[Tensor, "rows in"],
    owed: Float32[Tensor, "rows in"] | None,
    round_block: Rounder,
    order: Tensor,
    factor: Tensor,
    diagonal: Tensor,
) -> tuple[UInt8[Tensor, "rows in"], BFloat16[Tensor, "rows in"]]:
    """Codes of rows whose columns are in the factor's order, and what these miss of the rows with what is owed."""
    # Errors are kept in bf16 for the products between blocks: what they make up for is of the size of a rounding step,
    # so a 256th of it is next to nothing (KL on bookworm-6m, int3-g128-asym: .0321 in float32, .0323 so; the standard
    # error is .0003), and the products are most of the arithmetic.
    errors = torch.zeros(ordered.shape, dtype=torch.bfloat16, device=ordered.device)
    codes = torch.empty(ordered.shape, dtype=torch.uint8, device=ordered.device)
    for last in range(len(order), 0, -LAZY):
        block = slice(max(last - LAZY, 0), last)
        target = ordered[:, block].float().contiguous()
        if owed is not None:
            target = target + owed[:, block]
        wanted = target + errors[:, last:] @ factor[last:, block].bfloat16()
        error = torch.zeros_like(target)
        columns = order[block]
        coupling = factor[block, block].clone()
        coupling.diagonal().copy_(diagonal[block])
        codes[:, columns] = round_block(wanted, target, error, coupling, columns)
        errors[:, block] = error
    return codes, errors
