"""What differs between processors: each kind of grid, with and without calibration, on several code paths of a machine.

    python benchmarks/processors.py

Every path is a process of its own that is told which instructions to use: PyTorch by ATEN_CPU_CAPABILITY, MKL and
oneDNN by variables of their own, compiled kernels by NUMBA_CPU_NAME. What it writes is compared with what the machine
writes as it is. All of it takes some minutes on two cores, of which compiling kernels anew is one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from measure import machine

import halfbyte
from halfbyte import demo
from halfbyte.models.checkpoint import Checkpoint

RUNS = [
    *(("nearest", grid) for grid in ("int4-g128", "nf4-g64", "fp8-e4m3-channel", "mxfp4", "nvfp4", "q4_k", "iq3_s")),
    *(("gptq", grid) for grid in ("int4-g128", "nf4-g64", "q4_k")),
    ("awq+gptq", "int4-g128"),
]
CALIBRATION = {"source": str(demo.CALIBRATION), "samples": 4, "length": 256}
AS_IS = "as it is, two threads"
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # as on the command line
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SSE = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
GENERIC = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
PATHS = {
    AS_IS: THREADS,
    "one thread": THREADS | {"OMP_NUM_THREADS": "1"},
    "libraries with AVX2": THREADS | AVX2,
    "libraries with SSE4": THREADS | SSE,
    "kernels compiled for any x86-64": THREADS | GENERIC,
}


class Difference(NamedTuple):
    """Of what one path wrote from what another wrote."""

    same: bool
    codes: float
    """Share of the codes that differ."""
    steps: float
    """The largest difference of a decoded value, in steps: a group's range over the number of codes less one."""


def path_of(folder: Path, method: str, grid: str) -> Path:
    name = f"{method}-{grid}"
    return folder / (f"{name}.gguf" if grid in ("q4_k", "iq3_s") else name)


def write(folder: Path, runs: list[tuple[str, str]]) -> None:
    """All of the runs, in this process."""
    for method, grid in runs:
        out = path_of(folder, method, grid)
        halfbyte.quantize(
            demo.MODEL, out, method=method, grid=grid, calibration=CALIBRATION, pure=out.suffix == ".gguf" or None
        )


def weights(path: Path) -> list[bytes]:
    return [p.read_bytes() for p in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]


def difference(path: Path, other: Path) -> Difference:
    a, b = Checkpoint.open(path), Checkpoint.open(other)
    differing, codes, steps = 0, 0, 0.0
    for module in a.quantized:
        p, q = a.read_quantized(module), b.read_quantized(module)
        differing, codes = differing + int((p.codes != q.codes).sum()), codes + p.codes.numel()
        values = p.decode().double()
        grouped = values.unflatten(1, (-1, p.grid.group_size or values.shape[1]))
        step = (grouped.amax(-1) - grouped.amin(-1)) / (2 ** round(p.grid.bits((1024, 1024))) - 1)
        apart = (values - q.decode().double()).abs().view(grouped.shape).amax(-1)
        steps = max(steps, (apart / step.clamp(min=1e-30)).max().item())
    return Difference(weights(path) == weights(other), differing / codes, steps)


def rows(folder: Path, method: str, grid: str) -> list[str]:
    """Of one run: a row for the paths that wrote the same as the first, and one for each of the others."""
    first, *others = (path_of(folder / str(number), method, grid) for number in range(len(PATHS)))
    found = dict(zip(list(PATHS)[1:], (difference(first, other) for other in others), strict=True))
    alike = [name for name, d in found.items() if d.same]
    told = [f"| {method} {grid} | {', '.join(alike)} | the same | | | | |"] if alike else []
    if len(alike) < len(found):
        models = halfbyte.evaluate([first, *others], demo.MODEL, length=256, windows=4)["models"]
        base, *losses = (model["kl"] for model in models)
        told += [
            f"| {method} {grid} | {name} | differ | {d.codes:.2%} | {d.steps:.2g} | {base:.5f} | {loss - base:+.1e} |"
            for (name, d), loss in zip(found.items(), losses, strict=True)
            if not d.same
        ]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="only write every run into this folder")
    parser.add_argument("--methods", nargs="+", default=sorted({method for method, _ in RUNS}))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "processors.md")
    a = parser.parse_args()
    runs = [(method, grid) for method, grid in RUNS if method in a.methods]
    if a.write:
        write(a.write, runs)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for number, environment in enumerate(PATHS.values()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            cache = {"NUMBA_CACHE_DIR": f"{scratch}/kernels"} if "NUMBA_CPU_NAME" in environment else {}
            command = [sys.executable, __file__, "--write", str(folder), "--methods", *a.methods]
            subprocess.run(command, env={**os.environ, **environment, **cache}, check=True)
        table = [row for method, grid in runs for row in rows(Path(scratch), method, grid)]
    lines = [
        "# What differs between processors",
        "",
        f"`python benchmarks/processors.py --methods {' '.join(a.methods)}` on {machine()}, PyTorch "
        f"{torch.__version__} "
        f"with {torch.backends.cpu.get_cpu_capability()}; bookworm-6m, 4 calibration windows of 256 tokens.",
        f"Every path is compared with the machine {AS_IS}; KL: nats, of 4 held-out windows, there, and how much more.",
        "",
        "| | path | bytes | codes that differ | largest difference, steps | KL | more |",
        "|---|---|---|---:|---:|---:|---:|",
        *table,
    ]
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
