"""Threads that wait for products: every piece is done once, whoever is there."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from halfbyte.grids import parse
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels.cpu.team import for_products_alone
from halfbyte.kernels.panels import Panels, product

OUT, WIDTH = 512, 1024
"""16 pieces at 8 bits."""


@pytest.fixture(scope="module")
def panels() -> Panels:
    grid, w = parse("int8-g32"), torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    params = grid.fit(w, None, search=False)
    made = Quantized(grid, grid.encode(w, params), params).panels()
    assert made is not None
    return made


@pytest.fixture
def threads():
    """More than there are processors, which hold one another up."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, WIDTH, generator=generator).bfloat16() for _ in range(count)]


def test_thousands_of_products_one_after_another(panels, threads):
    xs = inputs(50)
    wanted = [x.float() @ panels.decode().T for x in xs]
    for _ in range(20):
        for x, y in zip(xs, wanted, strict=True):
            torch.testing.assert_close(product(x, panels, None, "exact").float(), y, rtol=2e-2, atol=0.3)


def test_products_of_several_callers_at_a_time(panels, threads):
    xs = inputs(200)
    wanted = [product(x, panels, None, "exact") for x in xs]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda x: product(x, panels, None, "exact"), xs))
    assert all(map(torch.equal, found, wanted))


def _multiplied(panels: Panels, x: torch.Tensor, pipe) -> None:
    pipe.send(product(x, panels, None, "exact").float().numpy())


def test_a_child_has_threads_of_its_own(panels, threads):
    (x,) = inputs(1)
    wanted, (ours, theirs) = product(x, panels, None, "exact"), multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_multiplied, args=(panels, x, theirs))
    child.start()
    assert ours.poll(60)
    assert torch.equal(torch.from_numpy(ours.recv()).bfloat16(), wanted)
    child.join(60)
    assert child.exitcode == 0


def test_a_process_ends_whose_threads_wait():
    code = """
import torch
from halfbyte.grids import parse
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels.panels import product
torch.set_num_threads(3)
grid, w = parse("int8-g32"), torch.randn(512, 1024)
params = grid.fit(w, None, search=False)
panels = Quantized(grid, grid.encode(w, params), params).panels()
print(product(torch.ones(1, 1024).bfloat16(), panels, None, "exact").shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 512])\n"), done.stderr


def test_torch_takes_one_thread_where_products_take_all(panels, threads):
    (x,) = inputs(1)
    wanted = product(x, panels, None, "exact")
    with for_products_alone():
        assert torch.get_num_threads() == 1
        assert torch.equal(product(x, panels, None, "exact"), wanted)
    assert torch.get_num_threads() == 4
