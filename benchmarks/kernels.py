"""Products with packed weights: what share of the memory's bandwidth they read at, beside torch's own.

    python benchmarks/kernels.py > benchmarks/results/kernels.md
    python benchmarks/kernels.py --threads 1 -k 'int4|q4_k'

Matrices of 4096 x 4096, as many of each as no cache holds, one after the other. The bandwidth is that of reading a
buffer, before and after: on virtual machines it changes, and a share above 100 % says that it did. Of the repeats the
median counts.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import get_args

import torch
from measure import machine
from torch.nn import functional

from halfbyte import grids
from halfbyte.formats import Activations
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels.cpu.panels import arithmetic, target
from halfbyte.kernels.panels import Panels, product, stacked

SIDE = 4096
COLD = 256 << 20
"""Bytes of weights that are read before any is read again."""
NAMES = ("int8-g32", "int4-g32", "int4-g128-asym", "int3-g64", "int2-g32", "q4_k", "q5_k", "q6_k", "q3_k", "q2_k",
         "iq4_xs", "nf4-g64", "nvfp4", "mxfp4", "fp8-e4m3-channel", "iq3_s", "iq2_xs")  # fmt: skip
TOKENS = (1, 4, 16, 128)


HEADS = ("grid", "activations", "computed in", "bits", "GB/s at 1 token", "share of the bandwidth",
         "of the file's bytes", *(f"{tokens} tokens, ms" for tokens in TOKENS))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-k", dest="pattern", default="", help="only grids that match this regular expression")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    print(f"# Products with packed weights\n\n{machine()}; {asked.threads} threads; {SIDE} x {SIDE}, "
          f"bfloat16 activations, cold weights, median of {asked.repeats}. Reading a buffer: {bandwidth:.1f} GB/s."
          "\n")  # fmt: skip
    print(f"| {' | '.join(HEADS)} |\n|---|---|---|" + "---:|" * (len(HEADS) - 3))
    for name in NAMES:
        if re.search(asked.pattern, name):
            for row in rows(name, bandwidth, asked.repeats):
                print(row, flush=True)
    weights = [torch.randn(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(-(-COLD // (2 * SIDE * SIDE)))]
    times = timings([partial(functional.linear, weight=w) for w in weights], asked.repeats)
    print(row_of("bfloat16 (torch)", "exact", "bfloat16", 2 * SIDE * SIDE, 2 * SIDE * SIDE, bandwidth, times))
    print(f"\nReading a buffer afterwards: {read_bandwidth():.1f} GB/s.")


def rows(name: str, bandwidth: float, repeats: int) -> Iterator[str]:
    """A row for each way to take activations that differs."""
    q = matrix(name)
    packed, here = q.panels(room=2.2), target()
    if packed is None or here is None:
        raise SystemExit(f"no kernel multiplies {name} here")
    n_bytes = packed.row_bytes * SIDE
    copies = [stacked(packed.tensors["codes"], [packed]) for _ in range(int(COLD // n_bytes) + 1)]
    ways: dict[str, Activations] = {}
    for activations in get_args(Activations):
        ways.setdefault(arithmetic(packed.form.levels, torch.bfloat16, activations, here), activations)
    for how, activations in ways.items():
        calls = [multiplied_by(p, activations) for p in copies]
        file_bytes = q.grid.bits(q.shape) / 8 * SIDE * SIDE
        yield row_of(name, activations, how, n_bytes, file_bytes, bandwidth, timings(calls, repeats))


def multiplied_by(packed: Panels, activations: Activations) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: product(x, packed, None, activations)


def row_of(name: str, activations: str, how: str, n_bytes: float, in_file: float, bandwidth: float, times: list) -> str:
    """Bytes in memory, and in the file."""
    read, of_file = (size / times[0] / 1e9 for size in (n_bytes, in_file))
    cells = (name, activations, how, f"{8 * n_bytes / SIDE / SIDE:.2f}", f"{read:.1f}", f"{read / bandwidth:.0%}",
             f"{of_file / bandwidth:.0%}", *(f"{1000 * seconds:.2f}" for seconds in times))  # fmt: skip
    return f"| {' | '.join(cells)} |"


def matrix(name: str) -> Quantized:
    """Of random weights, a few rows again and again: fitting a lattice takes long."""
    grid = grids.parse(name)
    w = torch.randn(256, SIDE, generator=torch.Generator().manual_seed(0))
    params = grid.fit(w, None, search=False)
    codes, times = grid.encode(w, params), SIDE // len(w)
    rows = grid.row_params((256, SIDE))
    return Quantized(
        grid, codes.repeat(times, 1), {n: p.repeat(times, 1) if n in rows else p for n, p in params.items()}
    )


def timings(calls: list[Callable[..., torch.Tensor]], repeats: int) -> list[float]:
    """Seconds of one call, for each number of tokens."""
    medians = []
    for tokens in TOKENS:
        x = torch.randn(tokens, SIDE, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
        times = []
        for number in range(1 + repeats):
            for call in calls if tokens < 64 else calls[:4]:
                started = time.perf_counter()
                call(x)
                times += [time.perf_counter() - started] if number else []
        medians.append(statistics.median(times))
    return medians


def read_bandwidth() -> float:
    """GB/s of adding up a buffer that no cache holds."""
    buffer = torch.zeros(COLD // 8, dtype=torch.int64)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - started)
    return 8e-9 * buffer.numel() / min(times)


if __name__ == "__main__":
    main()
