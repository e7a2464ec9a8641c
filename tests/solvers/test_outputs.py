"""Rows make up for the errors of one another, where gradients at their outputs say how they hang together."""

import pytest
import torch

from halfbyte.grids import parse
from halfbyte.solvers import outputs
from halfbyte.solvers.gptq import gptaq, gptq
from halfbyte.solvers.outputs import DAMPING, STEPS, OutputHessian, widths
from halfbyte.solvers.statistics import Statistics

OUT, WIDTH, TOKENS = 96, 256, 700
SOME = torch.Generator().manual_seed(3)
X = torch.randn(TOKENS, WIDTH, generator=SOME) @ (torch.randn(WIDTH, WIDTH, generator=SOME) / 16 + torch.eye(WIDTH))
G = torch.randn(TOKENS, OUT, generator=SOME) @ torch.randn(OUT, OUT, generator=SOME)
W = torch.randn(OUT, WIDTH, generator=SOME) * 0.05


def statistics(drift: bool = False) -> Statistics:
    found = Statistics(WIDTH)
    found.add(X, X * 1.01 if drift else None)
    return found


def hessian(out: int = OUT, gradients: torch.Tensor = G) -> OutputHessian:
    found = OutputHessian.empty(out)
    for part in gradients.split(150):
        found.add(part)
    return found


def loss(rounded: torch.Tensor) -> float:
    """Of the Kronecker-factored second derivative."""
    error = (W - rounded).double()
    return ((G.T @ G).double() @ error @ (X.T @ X).double() * error).sum().item()


@pytest.mark.parametrize(
    "name", ["int3-g32-asym", "nf4-g64", "nf4-g64-double", "fp8-e4m3-block", "nvfp4", "iq4_xs", "q3_k", "iq2_xxs"]
)
def test_less_is_lost_than_by_rows_alone_on_every_kind_of_grid(name):
    grid = parse(name)
    alone, together = gptq(W, grid, statistics()), gptq(W, grid, statistics(), hessian())
    assert loss(together.decode()) < 0.8 * loss(alone.decode())
    assert all(torch.equal(alone.params[key], value) for key, value in together.params.items())


def test_it_is_the_errors_so_far_that_rows_make_up_for():
    """Against the textbook: with everything before it fixed and nothing after, a row is best moved by the least
    squares that are left, in float64."""
    whole = (G.T @ G).double()
    whole.diagonal().add_(DAMPING * whole.diagonal().mean())
    errors, done = torch.zeros(OUT, WIDTH), torch.zeros(OUT, dtype=torch.bool)
    for step in hessian().steps(torch.device("cpu")):
        left = (~done).nonzero()[:, 0]
        best = torch.linalg.solve(whole[left][:, left], whole[left][:, done] @ errors[done].double())
        best = best[(left[:, None] == step.rows).nonzero()[:, 0]]
        torch.testing.assert_close(step.owed(errors).double(), best, rtol=1e-3, atol=1e-4)
        errors[step.rows] = torch.randn(len(step.rows), WIDTH, generator=SOME)
        done[step.rows] = True
    assert done.all()


def test_wide_outputs_are_parted(monkeypatch):
    monkeypatch.setattr(outputs, "WIDEST", 40)
    assert widths(OUT) == [32, 32, 32]
    parted = hessian()
    assert [block.shape for block in parted.blocks] == [(32, 32)] * 3
    torch.testing.assert_close(parted.blocks[1], (G.T @ G)[32:64, 32:64], rtol=1e-4, atol=1e-1)
    assert sorted(torch.cat([step.rows for step in parted.steps(torch.device("cpu"))]).tolist()) == list(range(OUT))
    alone, together = gptq(W, parse("int3-g32"), statistics()), gptq(W, parse("int3-g32"), statistics(), parted)
    assert loss(together.decode()) < loss(alone.decode())


def test_matrices_below_one_another_are_each_what_it_is_alone():
    first, second = hessian(64, G[:, :64]), hessian(32, G[:, 64:])
    codes = gptq(W, parse("int3-g32"), statistics(), OutputHessian.joined([first, second])).codes
    assert torch.equal(codes[:64], gptq(W[:64], parse("int3-g32"), statistics(), first).codes)
    assert torch.equal(codes[64:], gptq(W[64:], parse("int3-g32"), statistics(), second).codes)


def test_scaled_rows_are_rounded_as_they_would_be_without():
    scale = torch.tensor([0.5, 4.0]).repeat(OUT // 2)
    plain = gptq(W, parse("int3-g32"), statistics(), hessian())
    # In float64 nothing but the damping would differ.
    scaled = gptq(W * scale[:, None], parse("int3-g32"), statistics(), hessian().divided(scale))
    assert loss(scaled.decode() / scale[:, None]) == pytest.approx(loss(plain.decode()), rel=0.1)


def test_outputs_that_nothing_depends_on_are_rounded_as_ever():
    dead = OutputHessian([torch.zeros(OUT, OUT)], TOKENS)
    assert torch.equal(
        gptaq(W, parse("int4-g32"), statistics(True), dead).codes, gptaq(W, parse("int4-g32"), statistics(True)).codes
    )


def test_fewer_rows_than_steps():
    few, w = STEPS // 2, W[: STEPS // 2]
    codes = gptq(w, parse("int3-g32"), statistics(), hessian(few, G[:, :few])).codes
    assert codes.shape == (few, WIDTH)
    assert codes.float().std() > 0.5
