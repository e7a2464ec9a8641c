"""Tables of levels: better than llama.cpp's encoder, whatever the weights are."""

import ggml
import pytest
import torch
from weights import by_reference, importance, lost, normal, solve

from halfbyte.errors import BadRequest
from halfbyte.grids.scalar import SCALAR_GRIDS
from halfbyte.kernels.levels import values_of

NAMES = ["iq4_nl", "iq4_xs", "mxfp4", "ggml-nvfp4"]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_several_percent_below_those_of_llama_cpp(name, weighted):
    w, h = normal(), importance() if weighted else None
    assert lost(w, solve(SCALAR_GRIDS[name], w, h), h) < 0.97 * lost(
        w, ggml.encode(name.removeprefix("ggml-"), w, h), h
    )


@pytest.mark.parametrize("name", NAMES)
def test_search_never_loses_more_than_the_plain_choice(name):
    w = normal()
    assert lost(w, solve(SCALAR_GRIDS[name], w)) < lost(w, solve(SCALAR_GRIDS[name], w, search=False))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_the_level_nearest_to_it(name):
    grid, w = SCALAR_GRIDS[name], normal(16)
    params = grid.fit(w, None)
    values = values_of(grid.levels) * grid.scales.storage.load(params, grid.levels.unit)[..., None]
    least = (w.unflatten(1, (-1, grid.granularity))[..., None] - values[:, :, None]).abs().amin(-1).flatten(1)
    assert torch.allclose((w - grid.decode(grid.encode(w, params), params)).abs(), least, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_search_is_the_reference(name, weighted):
    grid, w, h = SCALAR_GRIDS[name], normal(), importance() if weighted else None
    params, reference = grid.fit(w, h), by_reference(grid.fit, w, h)
    for key, value in params.items():
        assert (value == reference[key]).float().mean() > 0.98  # sums are taken in another order
    codes = by_reference(grid.encode, w, params)
    assert (codes == grid.encode(w, params)).float().mean() > 0.9999


def test_a_width_that_is_no_multiple_is_refused_with_what_would_work():
    with pytest.raises(BadRequest, match="256"):
        SCALAR_GRIDS["iq4_xs"].fit(torch.zeros(2, 128), None)
