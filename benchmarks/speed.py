"""Time and memory on a synthetic Llama of 1.04 billion weights, side by side with llm-compressor, each as a whole process.

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
from halfbyte.models.checkpoint import Checkpoint

PEERS = Path(__file__).parent / "peers"
COPY = """
import sys, torch
from pathlib import Path
from halfbyte.containers.safetensors import Spec, Writer, read_header
entries = read_header(Path(sys.argv[1]) / "model.safetensors")
def spec(name, e):
    if "layers" in name and len(e.shape) == 2:  # 4 bits and a bf16 scale for 128
        return Spec((e.shape[0], e.shape[1] * 33 // 64), torch.uint8)
    return Spec(e.shape, e.dtype)
specs = {name: spec(name, e) for name, e in entries.items()}
writer = Writer(Path(sys.argv[2]), specs)
for name, entry in entries.items():
    tensor, spec = entry.read(), specs[name]
    writer.write(name, tensor if tensor.dtype == spec.dtype else tensor.view(torch.uint8).reshape(-1)[: spec.size_bytes].view(spec.shape))
writer.close()
"""
START = "import torch, numba, transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llmcompressor", help="a python that has it")
    parser.add_argument("--peer-methods", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=["minmax", "nearest", "gptq", "awq", "gptaq"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.md")
    a = parser.parse_args()
    rows: list[tuple[str, Cost]] = []

    def measure(name: str, command: list[str]) -> None:
        rows.append((name, run(command)))
        print(f"{name}: {rows[-1][1]}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"  # made by a process of its own: a child's peak memory starts at its parent's
        run([sys.executable, str(PEERS.parent / "synthetic.py"), str(model), "--layers", str(a.layers)])
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, calibrate.calibration(Checkpoint.open(model), "default", 16, 512, 0).tokens.numpy())
        measure("bytes read and written, nothing else", [sys.executable, "-c", COPY, str(model), str(Path(scratch) / "copy")])
        measure("python that imports torch, numba, transformers", [sys.executable, "-c", START])
        for method in a.methods:
            command = [
                sys.executable,
                "-m",
                "halfbyte",
                "quantize",
                str(model),
                "-o",
                str(Path(scratch) / method),
                "--method",
                method,
                "--samples",
                "16",
                "--json",
            ]
            measure(f"halfbyte {method} int4-g128", command)
        if a.llmcompressor:
            for method in a.peer_methods:
                command = [
                    a.llmcompressor,
                    str(PEERS / "llmcompressor_run.py"),
                    str(model),
                    str(Path(scratch) / f"lc-{method}"),
                    method,
                    "4",
                    "sym",
                    str(tokens),
                ]
                measure(f"llm-compressor 0.14 {method} int4-g128", command)
    lines = [
        f"# Time and memory, {a.layers} layers of a 1-billion-parameter Llama",
        "",
        f"`python benchmarks/speed.py --layers {a.layers}` with llm-compressor, on {machine()}. Whole processes, one run each, one after the other;",
        "calibration 16 windows of 512 tokens.",
        "",
        "| what | wall s | processor s | peak MB |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {c.wall:.1f} | {c.cpu:.1f} | {c.peak_mb:.0f} |" for name, c in rows),
    ]
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
