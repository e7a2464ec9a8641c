"""Time, memory and loss on a GPU: a synthetic Llama of 8.03 billion weights, or a cut of fewer layers, each run as a
whole process; and what the embedded model loses when it is quantized there and on the CPU.

    python benchmarks/gpu.py --samples 128 --length 2048

`read and written` is the floor of a run without calibration: the same bytes through the same reader and writer.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from measure import run

from halfbyte import demo
from halfbyte.containers.safetensors import SafetensorsFileWriter, Spec, read_header
from halfbyte.devices import device_named, title

HERE = Path(__file__).parent
RUNS = [("nearest", "int4-g128"), ("nearest", "fp8-e4m3-channel/fp8-e4m3-token"), ("gptq", "int4-g128")]
SAME = [
    ("nearest", "int4-g128"),
    ("gptq", "int4-g128"),
    ("gptq", "nf4-g64"),
    ("awq", "int4-g128-asym"),
    ("gptq", "Q4_K_M"),
]


class Row(NamedTuple):
    """A run as a whole process."""

    name: str
    wall: float
    """Seconds, with Python's start."""
    took: float | None = None
    """Seconds of the run itself, as its report says."""
    device_bytes: int | None = None
    memory_bytes: float | None = None


def quantized(model: Path, out: Path, method: str, grid: str, words: list[str]) -> Row:
    command = [sys.executable, "-m", "halfbyte", "quantize", str(model), "-o", str(out), "--overwrite", "--json"]
    cost = run([*command, "--method", method, "--grid", grid, "--device", "cuda", *words])
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    took = report["measured"]
    return Row(f"{method} {grid}", cost.wall, report["seconds"], took["device_bytes"], cost.peak_mb * 2**20)


def copied(model: Path, out: Path) -> Row:
    """Every tensor is read, and a quarter of each matrix's bytes, which 4 bits take, is written."""
    started = time.perf_counter()
    entries = read_header(model / "model.safetensors")
    specs = {
        name: Spec(
            (e.shape[0], e.shape[1] // 2) if len(e.shape) == 2 else e.shape,
            torch.uint8 if len(e.shape) == 2 else e.dtype,
        )
        for name, e in entries.items()
    }
    writer = SafetensorsFileWriter(out, specs)
    for name, entry in entries.items():
        value, spec = entry.read(), specs[name]
        writer.write(
            name,
            value
            if value.dtype == spec.dtype
            else value.view(torch.uint8).reshape(-1)[: spec.size_bytes].view(spec.shape),
        )
    writer.close()
    return Row("read and written", time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", nargs="*", default=sorted({method for method, _ in RUNS}))
    parser.add_argument("--same", action="store_true", help="compare losses with the CPU's too")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.md")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model, text = scratch / "model", scratch / "text.txt"
        text.write_text("\n".join([demo.CALIBRATION.read_text(encoding="utf-8")] * 2), encoding="utf-8")
        run([sys.executable, str(HERE / "synthetic.py"), str(model), "--size", "8b", "--layers", str(a.layers)])
        rows = [copied(model, scratch / "copy.safetensors")]
        print(rows[-1], flush=True)
        words = ["--calibration", str(text), "--samples", str(a.samples), "--length", str(a.length)]
        for method, grid in (found for found in RUNS if found[0] in a.methods):
            rows.append(quantized(model, scratch / "out", method, grid, words if method != "nearest" else []))
            print(rows[-1], flush=True)
    print(title(device_named("cuda")), rows)


if __name__ == "__main__":
    main()
