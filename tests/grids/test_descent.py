"""Descent: what it is never to do (lose more), what it must find (what an exhaustive search finds), what it meets."""

import pytest
import torch
from weights import correlated, edges, heavy_tailed, normal

from halfbyte.grids import parse
from halfbyte.kernels.levels import E2M1, E4M3, values_of
from halfbyte.recipe import method_named
from halfbyte.solvers import SOLVERS, solved
from halfbyte.solvers.descent import descend
from halfbyte.solvers.gptq import gptaq, gptq
from halfbyte.solvers.statistics import DAMPING, Statistics

GRIDS = {  # and of gptq's squared error, how much is left at most
    "int4-g32": 0.95, "int3-g128-asym": 0.97, "int4-channel": 0.97, "nvfp4": 0.93, "mxfp4": 0.95, "iq4_nl": 0.95,
    "nf4-g64": 0.95, "nf4-g64-double": 0.97, "q4_1": 0.95, "q4_k": 0.95, "q2_k": 0.9, "q3_k": 0.95, "iq2_xxs": 0.95,
    "fp8-e4m3-block": 1.0, "int2-tensor": 1.0,
}  # fmt: skip


def squared_error(w, q, statistics):
    """Of outputs, by the damped Hessian, in float64."""
    hessian, missed = statistics.hessian.double(), w.double() - q.decode().double()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return ((missed @ hessian) * missed).sum(1)


@pytest.mark.parametrize("name", GRIDS)
def test_no_row_loses_more_and_all_together_lose_less(name):
    grid, statistics, w = parse(name), correlated(), heavy_tailed(48)
    before = gptq(w, grid, statistics)
    after = descend(w, before, statistics)
    lost, left = squared_error(w, before, statistics), squared_error(w, after, statistics)
    assert (left <= lost * (1 + 1e-4)).all()
    assert left.sum() <= GRIDS[name] * lost.sum()
    assert {n: (p.shape, p.dtype) for n, p in after.params.items()} == {
        n: (p.shape, p.dtype) for n, p in before.params.items()
    }
    assert after.equal(descend(w, before, statistics))


def test_what_it_starts_from_stays_as_it_is():
    statistics, w = correlated(), normal(16)
    before = gptq(w, parse("nvfp4"), statistics)
    codes, scale = before.codes.clone(), before.params["scale"].clone()
    descend(w, before, statistics)
    assert torch.equal(before.codes, codes)
    assert torch.equal(before.params["scale"], scale)


@pytest.mark.parametrize("name", ["nvfp4", "int4-g32", "int4-g32-asym", "q4_k", "q4_1", "iq4_nl", "nf4-g64"])
def test_odd_weights_come_to_no_harm(name):
    statistics = correlated()
    for kind, w in edges().items():
        before = gptq(w, parse(name), statistics)
        after = descend(w, before, statistics)
        assert after.decode().isfinite().all(), kind
        lost, left = squared_error(w, before, statistics), squared_error(w, after, statistics)
        assert (left <= lost * (1 + 1e-4) + 1e-12 * w.square().sum(1)).all(), kind
        assert "zero" not in after.params or after.params["zero"].min() > 0, kind


def test_inputs_without_correlation_leave_what_an_exhaustive_search_finds():
    """NVFP4: all E4M3 scales of every group, and the nearest of all levels."""
    w, statistics, grid = normal(8, 128), Statistics(128), parse("nvfp4")
    statistics.add(torch.eye(128))
    found = descend(w, SOLVERS["nearest"](w, grid, None), statistics)
    scales = E4M3.value(torch.arange(1, 127).to(torch.uint8)) / found.params["divisor"].flatten()
    levels = values_of(E2M1)[:8] * scales[:, None]
    missed = (w.abs().view(8, 8, 16)[..., None, None] - levels).abs().amin(-1)
    least = missed.square().sum(2).amin(-1).sum()
    assert (w - found.decode()).square().sum() <= least * 1.002


def test_dead_inputs_leave_the_codes_alone():
    statistics = Statistics(64)
    statistics.add(torch.zeros(40, 64))
    w, grid = normal(8, 64), parse("int4-g32")
    before = SOLVERS["nearest"](w, grid, None)
    assert descend(w, before, statistics).equal(before)


def test_it_refines_any_solver_towards_that_solvers_target():
    some, w, grid = torch.Generator().manual_seed(3), normal(32), parse("nvfp4")
    x = torch.randn(1024, 512, generator=some) @ (torch.eye(512) + torch.randn(512, 512, generator=some) / 30)
    statistics = Statistics(512)
    statistics.add(x, x + 0.05 * torch.randn(x.shape, generator=some))
    method = method_named("gptaq+descent")
    assert method.full_precision
    q = solved(method.solver, method.refinements, w, grid, statistics)
    target = statistics.asymmetric_target(w, 0.5)
    before = squared_error(target, gptaq(w, grid, statistics), statistics).sum()
    assert squared_error(target, q, statistics).sum() < 0.95 * before
    assert method_named("descent") == method_named("gptq+descent")
