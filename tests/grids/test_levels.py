"""Tables of levels: better than llama.cpp's encoder, whatever the weights are."""

import ggml
import pytest
import torch

import halfbyte.grids.levels as levels
from halfbyte.errors import BadRequest
from halfbyte.grids.levels import LEVEL_GRIDS
from halfbyte.solvers.gptq import gptq
from halfbyte.solvers.nearest import nearest
from halfbyte.solvers.statistics import Statistics

NAMES = list(LEVEL_GRIDS)


def normal(rows=64, width=512, seed=0, std=0.02):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * std


def importance(width=512):
    return torch.rand(width, generator=torch.Generator().manual_seed(2)) ** 4 * 50


def lost(w, decoded, h=None):
    return ((w.double() - decoded.double()).square() * (1 if h is None else h)).sum().item()


def solve(grid, w, h=None, search=True):
    params = grid.fit(w, h, search)
    return grid.decode(grid.encode(w, params), params)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_several_percent_below_those_of_llama_cpp(name, weighted):
    w, h = normal(), importance() if weighted else None
    assert lost(w, solve(LEVEL_GRIDS[name], w, h), h) < 0.97 * lost(w, ggml.encode(name, w, h), h)


@pytest.mark.parametrize("name", NAMES)
def test_search_never_loses_more_than_the_plain_choice(name):
    w = normal()
    assert lost(w, solve(LEVEL_GRIDS[name], w)) < lost(w, solve(LEVEL_GRIDS[name], w, search=False))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_the_level_nearest_to_it(name):
    grid, w = LEVEL_GRIDS[name], normal(16)
    params = grid.fit(w, None)
    values = torch.tensor(grid.levels) * grid.scales(params)[..., None]
    least = (w.unflatten(1, (-1, grid.group))[..., None] - values[:, :, None]).abs().amin(-1).flatten(1)
    assert torch.allclose((w - grid.decode(grid.encode(w, params), params)).abs(), least, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_search_is_the_reference(name, weighted):
    grid, w, h = LEVEL_GRIDS[name], normal(), importance() if weighted else None
    params, reference = grid.fit(w, h), grid._stored(*levels.fit_reference(grid, w, h, True))
    for key, value in params.items():
        assert (value == reference[key]).float().mean() > 0.99  # sums are taken in another order
    codes = levels.encode_reference(grid, w, grid.scales(params))
    assert (codes == grid.encode(w, params)).float().mean() > 0.9999


@pytest.mark.parametrize("name", NAMES)
def test_columns_rounded_in_any_order_get_the_reference_codes(name):
    grid, w = LEVEL_GRIDS[name], normal(10)
    params, columns = grid.fit(w, None), torch.randperm(512, generator=torch.Generator().manual_seed(1))[:100]
    coupling = torch.tril(torch.randn(100, 100, generator=torch.Generator().manual_seed(3)) * 0.1, -1) + torch.eye(100)
    target = w[:, columns].contiguous()
    start = target.clone(), target, torch.zeros_like(target)
    ours = grid.round_block(*(t.clone() for t in start), coupling, params, columns.tolist())
    theirs = grid.round_block_reference(*(t.clone() for t in start), coupling, params, columns.tolist())
    assert (ours == theirs).float().mean() > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_gptq_lowers_the_error_of_the_output(name):
    statistics = Statistics(512)
    statistics.add(torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)) @ normal(64, 512, 5, 1.0))
    w, grid = normal(), LEVEL_GRIDS[name]
    assert statistics.error(w, gptq(w, grid, statistics).decode()) < 0.8 * statistics.error(w, nearest(w, grid, statistics).decode())


@pytest.mark.parametrize("name", NAMES)
def test_odd_weights_are_kept(name):
    grid, w = LEVEL_GRIDS[name], normal(8)
    assert not solve(grid, torch.zeros(4, 512)).any()
    zeros = w.clone()
    zeros[3], zeros[:, 32:96] = 0, 0
    for odd in (zeros, torch.full((4, 512), 0.013), torch.full((4, 512), -0.013), w.abs() + 0.01, w * torch.logspace(-1, 2, 8)[:, None]):
        back = solve(grid, odd)
        assert back.isfinite().all()
        assert lost(odd, back) < 0.02 * odd.double().square().sum()
    assert solve(grid, torch.full((1, 512), 3e38)).isfinite().all()
    assert solve(grid, torch.full((1, 512), 1e-30)).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_transposed_weights_are_read_as_they_are(name):
    grid, w = LEVEL_GRIDS[name], normal(16).bfloat16()
    assert torch.equal(solve(grid, w), solve(grid, w.float()))
    assert torch.equal(solve(grid, w.T.contiguous().T), solve(grid, w))


def test_a_width_that_is_no_multiple_is_refused_with_what_would_work():
    with pytest.raises(BadRequest, match="256"):
        LEVEL_GRIDS["iq4_xs"].fit(torch.zeros(2, 128), None)
