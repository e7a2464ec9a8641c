"""GPTQ and what it knows of its inputs, against the papers' formulas written out in numpy."""

import numpy as np
import pytest
import torch

from halfbyte.grids import parse
from halfbyte.grids.scalar import integers
from halfbyte.solvers.gptq import gptq, solve
from halfbyte.solvers.statistics import DAMPING, Statistics

WIDTH = 64


def inputs(tokens=400, seed=0):
    some = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=some) / 8 + torch.eye(WIDTH)
    return torch.randn(tokens, WIDTH, generator=some) @ mixed * torch.linspace(0.5, 3, WIDTH)


def seen(x, original=None):
    statistics = Statistics(WIDTH)
    for piece in range(0, len(x), 150):  # in parts, as a calibration has them
        statistics.add(x[piece : piece + 150], None if original is None else original[piece : piece + 150])
    return statistics


def textbook(w, hessian, scale, zero, top):
    """Frantar et al., 2210.17323, algorithm 1 with columns in order of decreasing importance (act-order), in
    float64."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, damped = w[:, order].copy(), hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    codes = np.zeros(w.shape, int)
    for k in range(w.shape[1]):
        s, z = scale[:, order[k]], zero[:, order[k]]
        codes[:, k] = np.clip(np.rint(w[:, k] / s) + z, 0, top)
        error = (w[:, k] - (codes[:, k] - z) * s) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:]
    return codes[:, np.argsort(order)]


@pytest.mark.parametrize("name", ["int4-g16", "int3-g32-asym", "int8-channel", "int2-g64"])
def test_codes_are_those_of_the_textbook(name):
    grid, statistics = parse(name), seen(inputs())
    w = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.05
    params = grid.fit(w, None)
    size = grid.group_size or WIDTH
    each = {key: p.double().repeat_interleave(size, 1).numpy() for key, p in params.items()}
    zero = each.get("zero", np.full(w.shape, grid.midpoint))
    theirs = textbook(w.double().numpy(), statistics.hessian.double().numpy(), each["scale"], zero, grid.levels.top)
    ours = solve(w, grid, params, statistics).numpy()
    # float32 and, between blocks of columns, bfloat16: a weight next to a border may fall on its other
    # side, and its row follows.
    assert (ours == theirs).mean() > 0.99


def test_the_hessian_is_the_sum_of_products_and_the_importance_its_diagonal():
    x = inputs()
    statistics, products = seen(x), x.double().T @ x.double()
    assert torch.allclose(statistics.hessian.double(), products, rtol=1e-5, atol=1e-3)
    assert torch.allclose(statistics.importance.double(), x.double().square().mean(0), rtol=1e-5)


def test_the_factor_is_that_of_lapack():
    statistics = seen(inputs())
    order, lower, diagonal = statistics.factor()
    hessian = statistics.hessian.double()
    assert torch.equal(order, hessian.diagonal().argsort(stable=True))
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    theirs = np.linalg.cholesky(damped[order][:, order].numpy())
    assert np.allclose((lower * diagonal).tril().numpy(), theirs, rtol=1e-3, atol=1e-3)


def test_conditional_is_what_is_left_of_a_variance_when_later_columns_are_known():
    statistics = seen(inputs())
    order = statistics.factor()[0]
    hessian = statistics.hessian.double()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    ordered = damped[order][:, order].numpy()
    # Of column k given those that are rounded after it, which are those before it in the order: a Schur complement.
    left = [
        ordered[k, k] - ordered[k, :k] @ np.linalg.solve(ordered[:k, :k], ordered[:k, k]) if k else ordered[0, 0]
        for k in range(WIDTH)
    ]
    found = statistics.conditional_variance()[order].double().numpy() * statistics.tokens
    assert np.allclose(found, left, rtol=1e-3)


def test_a_corrected_weight_is_the_least_squares_solution_for_the_inputs_as_they_were():
    was = inputs()
    x = was + 0.1 * inputs(seed=7)
    statistics, w = seen(x, was), torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
    hessian = (x.double().T @ x.double()).numpy()
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(WIDTH)
    missing = (w.double() @ (was - x).double().T @ x.double()).numpy()
    theirs = w.double().numpy() + np.linalg.solve(damped, missing.T).T
    assert np.allclose(statistics.asymmetric_target(w, 1.0).double().numpy(), theirs, rtol=1e-3, atol=1e-3)


def test_gptq_fits_and_solves():
    grid, statistics = integers(4, 16), seen(inputs())
    w = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.05
    q = gptq(w, grid, statistics)
    assert torch.equal(q.codes, solve(w, grid, q.params, statistics))
