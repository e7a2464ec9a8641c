"""Time, memory and loss on a GPU: a synthetic Llama of 8.03 billion weights, or a cut of fewer layers, each run as a
whole process; and what the embedded model loses when it is quantized there and on the CPU.

    python benchmarks/gpu.py

Products with packed weights are measured by gpu_products.py.
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
from measure import machine, run

import halfbyte
from halfbyte import demo
from halfbyte.containers.place import beside
from halfbyte.containers.safetensors import SafetensorsFileWriter, Spec, read_header
from halfbyte.devices import device_named, title

HERE = Path(__file__).parent
FP8 = "fp8-e4m3-channel/fp8-e4m3-token"
RUNS = [
    ("nearest", "int4-g128"), ("nearest", FP8), ("gptq", "int4-g128"), ("gptq", "Q4_K_M"), ("awq", "int4-g128-asym"),
]  # fmt: skip
SMALL = [
    ("nearest", "int4-g128"), ("gptq", "int4-g128"), ("gptq", "nf4-g64"), ("gptq", "Q4_K_M"), ("awq", "int4-g128-asym"),
    ("smoothquant+gptq", "w8a8"),
]  # fmt: skip


class Row(NamedTuple):
    """A run as a whole process."""

    name: str
    wall: float
    """Seconds, with Python's start."""
    took: float | None = None
    """Seconds of the run itself, as its report says."""
    device_bytes: int | None = None
    planned_bytes: int | None = None
    memory_mb: float | None = None

    def __str__(self) -> str:
        took, on_device, planned, memory = (
            "" if value is None else f"{value / unit:.1f}"
            for value, unit in zip(self[2:], (1, 1e9, 1e9, 1e3), strict=True)
        )
        return f"| {self.name} | {self.wall:.1f} | {took} | {on_device} | {planned} | {memory} |"


def _name(folder: Path, grid: str) -> Path:
    return folder / ("out.gguf" if grid.startswith("Q") else "out")


def quantized(model: Path, folder: Path, method: str, grid: str, words: list[str]) -> Row:
    out = _name(folder, grid)
    command = [
        sys.executable,
        "-m",
        "halfbyte",
        "quantize",
        str(model),
        "-o",
        str(out),
        "--overwrite",
        "--engine",
        "none",
    ]
    cost = run([*command, "--method", method, "--grid", grid, "--device", "cuda", "--quiet", *words])
    report = json.loads(beside(out, "report.json").read_text(encoding="utf-8"))
    taken = [report[when]["device_bytes"] for when in ("measured", "planned")]
    return Row(f"{method} {grid}", cost.wall, report["seconds"], *taken, memory_mb=cost.peak_mb)


def copied(model: Path, out: Path) -> Row:
    """Every tensor is read, and of each matrix the quarter of its bytes that 4 bits take is written."""
    started = time.perf_counter()
    entries = read_header(model / "model.safetensors")
    specs = {
        name: Spec((e.shape[0], e.shape[1] // 2), torch.uint8) if len(e.shape) == 2 else Spec(e.shape, e.dtype)
        for name, e in entries.items()
    }
    writer = SafetensorsFileWriter(out, specs)
    for name, entry in entries.items():
        value, spec = entry.read(), specs[name]
        if value.dtype != spec.dtype:
            value = value.view(torch.uint8).reshape(-1)[: spec.size_bytes].view(spec.shape)
        writer.write(name, value)
    writer.close()
    out.unlink()
    return Row("read and written", time.perf_counter() - started)


def both(folder: Path, method: str, grid: str) -> str:
    """The embedded model on the CPU and on the GPU: seconds, and what each loses, measured on the GPU."""
    outs, seconds = [], []
    for device in ("cpu", "cuda"):
        outs.append(_name(folder / device, grid))
        report = halfbyte.quantize(demo.MODEL, outs[-1], method=method, grid=grid, device=device, overwrite=True)
        seconds.append(report.seconds)
    measured = halfbyte.evaluate(outs, demo.MODEL, windows=16, device="cuda").models
    told = " | ".join(f"{model.kl:.5f}" for model in measured)
    return f"| {method} {grid} | {seconds[0]:.1f} | {seconds[1]:.1f} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many of the runs on the large model")
    parser.add_argument("--small", type=int, default=len(SMALL), help="how many of those on the small one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.md")
    a = parser.parse_args()
    lines = [
        "# On a GPU",
        "",
        f"`python benchmarks/gpu.py --layers {a.layers} --samples {a.samples} --length {a.length}` on "
        f"{title(device_named('cuda'))} with {machine()}, PyTorch {torch.__version__}.",
        "",
        f"A synthetic Llama with the shapes of Llama-3.1-8B, {a.layers} layers, whole processes; calibration of "
        f"{a.samples} x {a.length} tokens.",
        "`wall`: with Python's start; `run`: as the report says; memory: of the GPU as measured and as planned before "
        "the run, and of the process.",
        "",
        "| what | wall s | run s | GPU GB | planned GB | process GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model, text = scratch / "model", scratch / "text.txt"
        text.write_text("\n".join([demo.CALIBRATION.read_text(encoding="utf-8")] * 2), encoding="utf-8")
        run([sys.executable, str(HERE / "synthetic.py"), str(model), "--size", "8b", "--layers", str(a.layers)])
        say(str(copied(model, scratch / "copy.safetensors")))
        words = ["--calibration", str(text), "--samples", str(a.samples), "--length", str(a.length)]
        for method, grid in RUNS[: a.runs]:
            say(str(quantized(model, scratch, method, grid, words if method != "nearest" else [])))
        say("\nThe embedded model, one process; loss: KL divergence in nats over 16 held-out windows.\n")
        say("| what | CPU s | GPU s | CPU loss | GPU loss |")
        say("|---|---:|---:|---:|---:|")
        for method, grid in SMALL[: a.small]:
            say(both(scratch, method, grid))


if __name__ == "__main__":
    main()
