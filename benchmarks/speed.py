"""Time and memory on a synthetic Llama of 1.04 billion weights, side by side with peers, each as a whole process.

    python benchmarks/speed.py --llmcompressor LC/bin/python

`bytes` is the floor: the same bytes read and written by the same reader and writer, flushed to disk, and nothing else.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import Cost, machine, run

from halfbyte.models import calibrate

PEERS = Path(__file__).parent / "peers"
COPY = """
import sys, torch
from pathlib import Path
from halfbyte.containers.safetensors import Spec, Writer, read_header
from halfbyte.models.checkpoint import Checkpoint
bits = float(sys.argv[3])
entries = read_header(Path(sys.argv[1]) / "model.safetensors")
def spec(name, e):
    if "layers" in name and len(e.shape) == 2:
        return Spec((e.shape[0], int(e.shape[1] * bits / 8)), torch.uint8)
    return Spec(e.shape, e.dtype)
specs = {name: spec(name, e) for name, e in entries.items()}
writer = Writer(Path(sys.argv[2]), specs)
for name, entry in entries.items():
    tensor, spec = entry.read(), specs[name]
    raw = tensor.view(torch.uint8).reshape(-1)[: spec.size_bytes]
    writer.write(name, tensor if tensor.dtype == spec.dtype else raw.view(spec.shape))
writer.close()
"""
START = "import torch, numba, transformers"
INT4, FP8, NF4 = "int4-g128", "fp8-e4m3-channel/fp8-e4m3-token", "nf4-g64"
BITS = {INT4: 4.125, FP8: 8.0, NF4: 4.5}
OURS = [(method, INT4) for method in ("minmax", "nearest", "gptq", "awq", "gptaq")] + [
    ("minmax", FP8),
    ("nearest", FP8),
    ("minmax", NF4),
    ("nearest", NF4),
]
LLM_COMPRESSOR = [("rtn", INT4), ("gptq", INT4), ("rtn", FP8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", help="a python that has it")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["minmax", "nearest", "gptq", "awq", "gptaq", "rtn"],
        help="of ours and of peers",
    )
    parser.add_argument("--grids", nargs="*", default=list(BITS), choices=list(BITS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.md")
    a = parser.parse_args()
    rows: list[tuple[str, Cost]] = []

    def measure(name: str, command: list[str]) -> None:
        rows.append((name, run(command)))
        print(f"{name}: {rows[-1][1]}", flush=True)

    def is_asked(method: str, grid: str) -> bool:
        return method in a.methods and grid in a.grids

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = scratch / "model"  # made by a process of its own: a child's peak memory starts at its parent's
        run([sys.executable, str(PEERS.parent / "synthetic.py"), str(model), "--layers", str(a.layers)])
        tokens = scratch / "tokens.npy"
        np.save(tokens, calibrate.calibration(Checkpoint.open(model), "default", 16, 512, 0).tokens.numpy())
        measure("python that imports torch, numba, transformers", [sys.executable, "-c", START])
        for grid in a.grids:
            measure(
                f"bytes of {grid} read and written, nothing else",
                [sys.executable, "-c", COPY, str(model), str(scratch / "copy"), str(BITS[grid])],
            )
            for method in (m for m, g in OURS if g == grid and is_asked(m, g)):
                out = ["-o", str(scratch / "out"), "--overwrite", "--samples", "16", "--json"]
                measure(
                    f"halfbyte {method} {grid}",
                    [
                        sys.executable,
                        "-m",
                        "halfbyte",
                        "quantize",
                        str(model),
                        "--method",
                        method,
                        "--grid",
                        grid,
                        *out,
                    ],
                )
            for method in (m for m, g in LLM_COMPRESSOR if a.llmcompressor and g == grid and is_asked(m, g)):
                command = [
                    a.llmcompressor,
                    str(PEERS / "llmcompressor_run.py"),
                    str(model),
                    str(scratch / "peer"),
                    method,
                    grid,
                    str(tokens),
                ]
                measure(f"llm-compressor 0.14 {method} {grid}", command)
            if grid == NF4:
                measure(
                    "bitsandbytes 0.50 nf4, through Transformers",
                    [sys.executable, str(PEERS / "bitsandbytes_run.py"), str(model), str(scratch / "peer")],
                )
    lines = [
        f"# Time and memory, {a.layers} layers of a 1-billion-parameter Llama",
        "",
        f"`python benchmarks/speed.py --layers {a.layers} --methods {' '.join(a.methods)} --grids "
        f"{' '.join(a.grids)}` with peers, on {machine()}.",
        "Whole processes, one run each, one after the other; calibration 16 windows of 512 tokens.",
        "",
        "| what | wall s | processor s | peak MB |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {c.wall:.1f} | {c.cpu:.1f} | {c.peak_mb:.0f} |" for name, c in rows),
    ]
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
