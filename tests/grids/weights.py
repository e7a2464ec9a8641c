"""Weights and inputs that the tests of grids share, and how much of them is lost."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import halfbyte
from halfbyte.kernels import choose
from halfbyte.solvers.statistics import Statistics


def normal(rows=64, width=512, seed=0, std=0.02):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * std


def heavy_tailed(rows=64, width=512, seed=0):
    """Student's t, with three degrees of freedom."""
    chi_squared = sum(normal(rows, width, seed + k, 1.0).square() for k in (1, 2, 3))
    return normal(rows, width, seed) / (chi_squared / 3).sqrt()


def trained():
    """Every eighth row of the linears of bookworm-6m."""
    model = load_file(Path(halfbyte.__file__).parent / "demo" / "model" / "model.safetensors")
    return torch.cat([w.reshape(-1, 512) for name, w in model.items() if name.endswith("proj.weight")])[
        ::8
    ].contiguous()


def edges(rows=24, width=512):
    """Weights that have broken quantizers before, by what is odd about them."""
    w = normal(rows, width)
    zeros, outlier, constant = w.clone(), w.clone(), w.clone()
    zeros[3], zeros[:, 32:64] = 0, 0
    outlier[5, 40] = 9.0
    constant[2], constant[7] = 0.013, -0.013
    return {
        "normal": w,
        "zeros": zeros,
        "all zero": torch.zeros_like(w),
        "outlier": outlier,
        "constant rows": constant,
        "positive": w.abs() + 0.01,
        "negative": -w.abs() - 0.01,
        "sparse": w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.05),
        "one level": torch.full_like(w, 0.02),
        "laplace": w.sign() * w.abs() ** 2 * 30,
        "wide range": w * torch.logspace(-3, 2, rows)[:, None],
    }


def importance(width=512):
    return torch.rand(width, generator=torch.Generator().manual_seed(2)) ** 4 * 50


def correlated(width=512):
    """Statistics of inputs that lie in an eighth of their dimensions."""
    statistics = Statistics(width)
    statistics.add(normal(2048, width // 8, 0, 1.0) @ normal(width // 8, width, 5, 1.0))
    return statistics


def lost(w, decoded, h=None):
    """The weighted squared error."""
    return ((w.double() - decoded.double()).square() * (1 if h is None else h)).sum().item()


def solve(grid, w, h=None, search=True):
    """Weights as they come back from a grid."""
    params = grid.fit(w, h, search)
    return grid.decode(grid.encode(w, params, h), params)


def rounded_in_any_order(grid, w, count):
    """Codes of `count` columns in random order, each making up for what those before it missed: compiled, and the
    reference."""
    params = grid.fit(w, None)
    runs = torch.randperm(w.shape[1] // grid.vector_size, generator=torch.Generator().manual_seed(1))[
        : count // grid.vector_size
    ]
    columns = (runs[:, None] * grid.vector_size + torch.arange(grid.vector_size)).flatten()
    coupling = torch.tril(normal(count, count, 3, 0.1), -1) + torch.eye(count)
    target = w[:, columns].contiguous()
    for kernels in ("fast", "reference"):
        with choose.using(kernels):
            yield grid.rounder(params, tuple(w.shape))(
                target.clone(), target, torch.zeros_like(target), coupling, columns
            )


def one_by_one(grid, w, params):
    """Codes of columns that are rounded one after another, none of which makes up for anything."""
    width = w.shape[1]
    wanted, coupling = w.float().contiguous(), torch.zeros(width, width)
    columns = torch.arange(width)
    return grid.rounder(params, tuple(w.shape))(wanted.clone(), wanted, torch.zeros_like(wanted), coupling, columns)


def by_reference(call, *args):
    """What an operation returns where its torch reference runs."""
    with choose.using("reference"):
        return call(*args)
