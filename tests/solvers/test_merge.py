"""Statistics of several workers, as one."""

import pytest
import torch

from halfbyte.solvers.statistics import Statistics

X = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def seen(*parts: torch.Tensor, drift: bool = False) -> Statistics:
    found = Statistics(64)
    for x in parts:
        found.add(x, x + 0.1 if drift else None)
    return found


def total(*statistics: Statistics) -> Statistics:
    found, *others = statistics
    for other in others:
        found += other
    return found


@pytest.mark.parametrize("drift", [False, True])
def test_statistics_of_parts_in_order_are_those_of_all(drift):
    parts = X.split(32)
    merged = total(*(seen(part, drift=drift) for part in parts))
    whole = seen(*parts, drift=drift)
    assert merged.tokens == whole.tokens == 96
    assert all(map(torch.equal, merged.activation_stats, whole.activation_stats))
    torch.testing.assert_close(merged.hessian.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(merged.hessian, whole.hessian, rtol=1e-5, atol=1e-4)
    assert (merged.drift is None) == (whole.drift is None) == (not drift)
    if drift:
        torch.testing.assert_close(merged.drift, whole.drift, rtol=1e-4, atol=1e-3)
    order, factor, diagonal = merged.factor()
    rebuilt = (factor * diagonal.square()) @ factor.T
    damped = merged.hessian[order][:, order] + 0.01 * merged.hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(rebuilt, damped, rtol=1e-3, atol=1e-2)


def test_the_same_parts_in_the_same_order_give_the_same_bytes_whoever_made_them():
    a, b, c = X.split(32)
    by_one = total(seen(a), seen(b), seen(c))
    ready = {name: seen(x) for name, x in (("c", c), ("a", a), ("b", b))}  # the last was ready first
    by_three = total(ready["a"], ready["b"], ready["c"])
    assert torch.equal(by_one.hessian, by_three.hessian)
    assert all(map(torch.equal, by_one.factor(), by_three.factor()))


def test_a_half_that_was_made_whole_merges_with_one_that_was_not():
    a, b, _ = X.split(32)
    one = seen(a)
    assert one.hessian.isfinite().all()  # both triangles are there now
    expected = total(seen(a), seen(b)).hessian
    assert torch.equal(total(one, seen(b)).hessian, expected)
