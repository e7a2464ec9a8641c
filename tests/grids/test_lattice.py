"""Lattices: only vectors of the lattice, better ones than llama.cpp's encoder finds, whatever the weights are."""

import ggml
import pytest
import torch
from weights import by_reference, correlated, lost, normal, solve

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.lattice import LATTICE_GRIDS, LatticeGrid
from halfbyte.kernels import lattice
from halfbyte.solvers.gptq import gptaq, gptq
from halfbyte.solvers.gptq import solve as solve_gptq

NAMES = [name for name in LATTICE_GRIDS if not name.startswith("iq1")]


def importance(width=512):
    return torch.rand(width, generator=torch.Generator().manual_seed(2)) ** 2 * 5 + 0.05


def in_lattice(grid, codes):
    vectors = (codes & 127).unflatten(1, (-1, grid.dimension))
    entries = lattice.entry_of_key(grid.name)[lattice.keys(vectors).int() & 0xFFFF]
    odd = (codes >> 7).unflatten(1, (-1, grid.vector_size)).sum(-1) % 2 == 1
    return bool((entries >= 0).all()) and not (grid.parity and odd.any())


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_below_those_of_llama_cpp(name, weighted):
    w, h = normal(), importance() if weighted else torch.ones(512)
    factor = 0.92 if weighted else 1.0
    assert lost(w, solve(LATTICE_GRIDS[name], w, h if weighted else None), h) < factor * lost(
        w, ggml.encode(name, w, h), h
    )


@pytest.mark.parametrize("name", NAMES)
def test_search_never_loses_more_than_the_plain_choice(name):
    w = normal()
    assert lost(w, solve(LATTICE_GRIDS[name], w)) < lost(w, solve(LATTICE_GRIDS[name], w, search=False))


@pytest.mark.parametrize("name", NAMES)
def test_every_vector_is_in_the_lattice(name):
    grid, w, statistics = LATTICE_GRIDS[name], normal(16), correlated()
    params = grid.fit(w, None)
    assert in_lattice(grid, grid.encode(w, params))
    assert in_lattice(grid, grid.encode(w, params, importance()))
    assert in_lattice(grid, gptq(w, grid, statistics).codes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_search_is_the_reference(name, weighted):
    grid, w, h = LATTICE_GRIDS[name], normal(16), importance() if weighted else None
    params, reference = grid.fit(w, h), by_reference(grid.fit, w, h)
    for key, value in params.items():
        assert (value == reference[key]).float().mean() > 0.98  # sums are taken in another order
    codes = grid.encode(w, params, h)
    assert (codes == by_reference(grid.encode, w, params, h)).float().mean() > 0.999


def every_vector(grid):
    """All that the lattice has, of `vector_size` values each, for a scale of 1."""
    signs = torch.cartesian_prod(*[torch.tensor([0, 128])] * grid.vector_size).to(torch.uint8)
    signs = signs[(signs >> 7).sum(1) % 2 == 0] if grid.parity else signs
    book = lattice.codebook(grid.name)
    if grid.dimension < grid.vector_size:
        pairs = book[:, None].expand(-1, len(book), -1), book[None].expand(len(book), -1, -1)
        book = torch.cat(pairs, -1).flatten(0, 1)
    return torch.stack([grid.value(book | sign) for sign in signs]).flatten(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iq2_xxs", "iq2_xs", "iq3_xxs", "iq3_s"])
def test_the_search_comes_within_a_few_percent_of_comparing_all_vectors(name):
    grid, w = LATTICE_GRIDS[name], normal(1, 256)
    params = grid.fit(w, None)
    scales = grid.scales(params).repeat_interleave(grid.group, 1)
    size, vectors = grid.vector_size, every_vector(grid)
    lengths = vectors.square().sum(1)
    best = []
    for k in range(0, 128, size):
        wanted, scale = w[0, k : k + size], scales[0, k]
        # |s v - w|^2, but for the |w|^2 that all have
        best.append(vectors[(scale.square() * lengths - vectors @ (2 * scale * wanted)).argmin()] * scale)
    best = torch.cat(best)
    ours = grid.decode(grid.encode(w, params), params)[0, :128]
    assert lost(w[0, :128], ours) < 1.03 * lost(w[0, :128], best)


@pytest.mark.parametrize("name", NAMES)
def test_what_columns_count_for_in_gptq_lowers_the_error_further_than_distance(name):
    w, grid, statistics = normal(), LATTICE_GRIDS[name], correlated()
    ours = gptq(w, grid, statistics)

    class Euclidean(LatticeGrid):
        def rounder(self, params, shape):
            def nearest(wanted, target, error, coupling, columns):
                run = torch.arange(len(coupling)) // grid.vector_size
                flat = coupling.masked_fill(run == run[:, None], 0) + torch.eye(len(coupling))
                return grid.rounder(params, shape)(wanted, target, error, flat, columns)

            return nearest

    plain = Euclidean(**{field: getattr(grid, field) for field in grid.__dataclass_fields__})
    assert statistics.error(w, ours.decode()) < statistics.error(
        w, grid.decode(solve_gptq(w, plain, ours.params, statistics), ours.params)
    )


def test_one_statistic_serves_grids_that_round_one_column_and_grids_that_round_eight():
    from halfbyte.grids import parse

    w, grid = normal(), LATTICE_GRIDS["iq2_s"]
    alone = gptaq(w, grid, correlated())
    shared = correlated()
    gptq(w, parse("int4-g32"), shared)
    assert gptaq(w, grid, shared).equal(alone)


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m"])
def test_types_of_one_bit_are_read_only(name):
    with pytest.raises(Unsupported, match="iq2_xxs"):
        LATTICE_GRIDS[name].fit(normal(), None)


def test_a_width_that_is_no_multiple_is_refused_with_what_would_work():
    with pytest.raises(BadRequest, match="256"):
        LATTICE_GRIDS["iq2_s"].fit(torch.zeros(2, 128), None)
