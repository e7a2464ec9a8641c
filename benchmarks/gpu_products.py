"""Products with packed weights on a GPU: what share of the memory's bandwidth they read at, beside torch's in bfloat16,
torchao's and Marlin's.

    python benchmarks/gpu_products.py
    python benchmarks/gpu_products.py -k 'int4|Marlin' --out /tmp/products.md

Matrices of Llama-3.1-8B's shapes, as many of each as no cache holds, one after another: in a CUDA graph, which is what
the GPU takes, and as Python starts them, which is what a model takes whose steps are not captured. The bandwidth is
that of adding up a buffer, in the same run. torchao and Marlin (GPTQModel's) take part where they are installed.
"""

import argparse
import copy
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import machine
from torch import Tensor, nn

from halfbyte import grids
from halfbyte.containers.gptq import GPTQ
from halfbyte.devices import device_named, title
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels.panels import Panels
from halfbyte.multiplying import PanelLinear

HERE = Path(__file__).parent
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Out-features and in-features."""
TOKENS = (1, 2, 4, 8, 16, 64, 512)
NAMES = ("int4-g128", "int4-g128-asym", "nf4-g64", "mxfp4", "nvfp4", "q4_k", "q6_k", "int8-channel", "fp8-e4m3-channel")
COLD = 512 << 20
"""Bytes of weights that are read before any is read again: four times the largest cache."""
FITTED_ROWS = 256
"""Again and again: all take the same time."""
MOST_OFF = 0.2
"""Of the product with the original, in norms: 4 bits lose a tenth, and a product with other weights everything."""


class Linear(NamedTuple):
    module: nn.Module
    bits: float
    """Of a weight in memory, with all that belongs to it."""


Make = Callable[[Tensor], Linear]


def quantized(w: Tensor, name: str) -> Quantized:
    grid, times = grids.parse(name), len(w) // FITTED_ROWS
    params = grid.fit(w[:FITTED_ROWS], None, search=False)
    codes, rows = grid.encode(w[:FITTED_ROWS], params), grid.row_params((FITTED_ROWS, w.shape[1]))
    return Quantized(
        grid, codes.repeat(times, 1), {n: p.repeat(times, 1) if n in rows else p for n, p in params.items()}
    )


def halfbytes(name: str, w: Tensor) -> Linear:
    panels = quantized(w, name).panels()
    assert isinstance(panels, Panels)
    return Linear(PanelLinear(panels, None, torch.bfloat16), 8 * panels.row_bytes / w.shape[1])


def torchs(w: Tensor) -> Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data = w.bfloat16()
    return Linear(linear, 16)


def torchaos(w: Tensor) -> Linear:
    """Its kernel for 4 bits is torch's own ("tinygemm"), of a scale and a zero in bfloat16 for each group."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        quantize_,
    )

    model = nn.Sequential(torchs(w).module).cuda()
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return Linear(model, 4 + 32 / 128)


def marlins(w: Tensor) -> Linear:
    """GPTQModel compiles it as it is first used, for minutes."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear  # pyright: ignore[reportMissingImports]

    out, width = w.shape
    linear: Any = MarlinLinear(
        bits=4, group_size=128, desc_act=False, sym=True, in_features=width, out_features=out, dtype=torch.bfloat16
    )
    linear.load_state_dict(GPTQ().pack(quantized(w, "int4-g128")), strict=False)
    linear.cuda().post_init()
    return Linear(linear, 4 + 16 / 128)


def contenders() -> dict[str, Make]:
    made: dict[str, Make] = {"torch bfloat16": torchs} | {name: partial(halfbytes, name) for name in NAMES}
    made |= {"torchao int4-g128": torchaos} if find_spec("torchao") else {}
    return made | ({"Marlin int4-g128": marlins} if find_spec("gptqmodel") else {})


def copies(linear: Linear, n_weights: int) -> list[nn.Module]:
    """On the GPU, as many as no cache holds."""
    module = linear.module.cuda()
    return [module] + [copy.deepcopy(module) for _ in range(int(8 * COLD / (linear.bits * n_weights)))]


def microseconds(modules: list[nn.Module], x: Tensor, captured: bool) -> float:
    """Of one product."""
    from triton.testing import do_bench, do_bench_cudagraph

    def all_of_them() -> None:
        for module in modules:
            module(x)

    milliseconds: Any = (do_bench_cudagraph if captured else do_bench)(all_of_them, return_mode="median")
    return 1000 * milliseconds / len(modules)


def row(name: str, make: Make, shape: tuple[int, int], bandwidth: float) -> str:
    out, width = shape
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(FITTED_ROWS, width, generator=generator).repeat(out // FITTED_ROWS, 1)
    linear = make(w)
    modules = copies(linear, out * width)
    cells = []
    for tokens in TOKENS:
        x = torch.randn(tokens, width, generator=generator)
        wanted, found = x @ w.T, modules[-1](x.bfloat16().cuda()).float().cpu()
        if not (found - wanted).norm() <= MOST_OFF * wanted.norm():  # NaN is wrong too
            raise SystemExit(f"{name} multiplies {tokens} tokens by {shape} wrongly")
        taken, started = (microseconds(modules, x.bfloat16().cuda(), captured) for captured in (True, False))
        share = linear.bits * out * width / 8 / (taken * 1e-6) / bandwidth
        cells.append(f"{taken:.1f} ({share:.0%}); {started:.1f}")
    return f"| {name} | {out} x {width} | {linear.bits:.2f} | {' | '.join(cells)} |"


def read_bandwidth() -> float:
    """Bytes per second of adding up a buffer that no cache holds."""
    from triton.testing import do_bench

    buffer = torch.ones(COLD // 2, dtype=torch.float32, device="cuda")
    milliseconds: Any = do_bench(buffer.sum, return_mode="median")
    return buffer.numel() * 4 / (1e-3 * milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="pattern", default="", help="only rows whose names match this regular expression")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_products.md")
    a = parser.parse_args()
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    lines = [
        "# Products with packed weights on a GPU",
        "",
        f"`python benchmarks/gpu_products.py` on {title(device_named('cuda'))} with {machine()}, PyTorch "
        f"{torch.__version__}. Adding up a buffer: {bandwidth / 1e9:.0f} GB/s.",
        "",
        "Microseconds of a product in a CUDA graph (share of that bandwidth); as Python starts it.",
        "",
        f"| weights | out x in | bits | {' | '.join(f'{tokens} tokens' for tokens in TOKENS)} |",
        f"|---|---|---:|{'---:|' * len(TOKENS)}",
    ]
    print("\n".join(lines), flush=True)
    for shape in SHAPES:
        for name, make in contenders().items():
            if re.search(a.pattern, name):
                lines.append(row(name, make, shape, bandwidth))
                print(lines[-1], flush=True)
                a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
