"""Rounding a block of columns with feedback: every implementation chooses what the torch reference chooses.

Kernels for GPUs run on a CPU in Triton's interpreter where there is no GPU.
"""

import pytest
import torch

from halfbyte.grids import parse
from halfbyte.kernels import choose, scalar

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [
    "int4-g128", "int4-g128-asym", "int8-channel", "llm-int8", "nf4-g64", "nf4-g64-double", "nvfp4", "mxfp4",
    "mxfp6-e3m2", "fp8-e4m3-block", "fp8-e5m2-channel", "fp8-e4m3-tensor", "iq4_xs", "q3_k", "q4_k", "q6_k",
]  # fmt: skip


def problem(name: str, rows: int = 37, width: int = 100):
    """A block of permuted columns whose weights were moved by the errors of others, and what couples it."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, 512, generator=generator) * 0.02
    columns = torch.randperm(512, generator=generator)[:width]
    target = w[:, columns]
    wanted = target + torch.randn(rows, width, generator=generator) * 0.003
    coupling = torch.randn(width, width, generator=generator).tril_() * 0.1
    return w, [wanted, target.contiguous(), torch.zeros_like(target), coupling, columns]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRIDS)
def test_the_kernel_for_gpus_rounds_as_the_reference_does(name):
    from halfbyte.kernels.gpu.round_block import round_block

    grid = parse(name)
    w, operands = problem(name)
    params = {key: value.to(DEVICE) for key, value in grid.fit(w, None).items()}
    found = {}
    for kernel in (round_block, scalar.round_block):
        wanted, target, error, coupling, columns = (value.clone().to(DEVICE) for value in operands)
        with choose.using("reference"):
            lookup, size = grid.rounder(params, tuple(w.shape)).args
            codes = kernel(lookup, size, wanted, target, error, coupling, columns)
        found[kernel] = codes.cpu(), error.cpu()
    (codes, error), (expected, missed) = found.values()
    assert torch.equal(codes, expected)
    assert torch.equal(error, missed)
