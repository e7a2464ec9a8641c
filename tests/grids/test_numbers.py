"""What may change by a little while codes stay: it is stored as it was, decodes to what `decode` gives, and has
gradients."""

import pytest
import torch
from test_every_grid import EVERY
from weights import normal

from halfbyte.grids import parse
from halfbyte.solvers.nearest import nearest

POWERS_OF_TWO = {name for name in EVERY if name.startswith("mx")}


@pytest.mark.parametrize("name", EVERY)
def test_numbers_of_every_grid(name):
    q = nearest(normal(32), parse(name), None)
    numbers = q.grid.numbers(q.params)
    assert bool(numbers) == (name not in POWERS_OF_TWO)
    if not numbers:
        return
    again = q.grid.nearest_params(q.params, numbers)
    assert again.keys() == q.params.keys()
    assert all(torch.equal(again[n], p) and again[n].dtype == p.dtype for n, p in q.params.items())
    for value in numbers.values():
        assert value.dtype == torch.float32
    leaves = {n: value.clone().requires_grad_() for n, value in numbers.items()}
    values = q.grid.expand(q.codes, q.params, leaves)
    torch.testing.assert_close(values.detach(), q.decode(), rtol=1e-6, atol=1e-9)
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(values, list(leaves.values()), direction)
    for (n, value), gradient in zip(numbers.items(), gradients, strict=True):
        moved = value + 1e-2 * value.abs().mean()  # values are linear in each kind of numbers
        change = (
            ((q.grid.expand(q.codes, q.params, {**numbers, n: moved}) - values.detach()) * direction).double().sum()
        )
        expected = (gradient * (moved - value)).double().sum()
        assert change.item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-4 * gradient.norm().item())


@pytest.mark.parametrize("name", [name for name in EVERY if name not in POWERS_OF_TWO])
def test_whatever_numbers_become_a_file_holds_them(name):
    q = nearest(normal(32), parse(name), None)
    for factor in (-3.0, 0.0, 0.7, 1e12):
        numbers = {n: value * factor for n, value in q.grid.numbers(q.params).items()}
        params = q.grid.nearest_params(q.params, numbers)
        assert all(params[n].dtype == p.dtype and params[n].shape == p.shape for n, p in q.params.items())
        assert q.grid.decode(q.codes, params).isfinite().all()
        again = q.grid.nearest_params(params, q.grid.numbers(params))
        assert all(torch.equal(again[n], p) for n, p in params.items())
