"""What runs were planned to take, and what they took: memory of the whole process, disk, and time.

    python benchmarks/run_resources.py --model bookworm-6m=src/halfbyte/demo/model --model llama-1b=/tmp/llama-1b

Each run is a process of its own, and both figures are those of its report. Time is planned as the run begins, at the
pace that the machine has then: what else runs on it, and when, is in the ratio.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from measure import machine, run

RUNS = (
    ("nearest", "int4-g128"), ("nearest", "nvfp4"), ("nearest", "Q4_K_M"), ("nearest", "IQ2_XXS"),
    ("gptq", "int4-g128"), ("awq+gptq", "int4-g128"), ("smoothquant", "w8a8"), ("gptq", "Q4_K_M"),
)  # fmt: skip
FILES = ("Q4_K_M", "IQ2_XXS")


def measured(model: str, method: str, grid: str, samples: int, length: int) -> dict:
    """The report of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.gguf" if grid in FILES else "out")
        words = ["quantize", model, "-o", str(out), "--method", method, "--grid", grid, "--engine", "none"]
        words += ["--samples", str(samples), "--length", str(length), "--smaller-groups", "--json"]
        words = [word for word in words if word != "--smaller-groups" or grid == "int4-g128"]
        done = run([sys.executable, "-m", "halfbyte", *words])
        beside = out.with_name("out.report.json") if out.suffix else out / "report.json"
        report = json.loads(beside.read_text())
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    return report | {"wall": done.wall, "outer": done.peak_mb * 2**20}


def row(name: str, method: str, grid: str, report: dict) -> tuple[str, ...]:
    planned, took = report["planned"], report["measured"]
    cells = [name, f"{method} {grid}"]
    for entry, unit, digits in (("memory_bytes", 1e6, 0), ("disk_bytes", 1e6, 1), ("seconds", 1, 1)):
        cells += [f"{said[entry] / unit:.{digits}f}" for said in (planned, took)]
        cells.append(f"{planned[entry] / took[entry]:.2f}")
    return tuple(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--run", action="append", metavar="METHOD,GRID")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    runs = [tuple(words.split(",")) for words in arguments.run] if arguments.run else RUNS
    print(f"{machine()}; {os.environ.get('OMP_NUM_THREADS', 'all')} threads; {arguments.samples} samples of "
          f"{arguments.length} tokens\n")  # fmt: skip
    print("| model | run | memory planned, MB | measured | ratio | disk planned, MB | measured | ratio "
          "| time planned, s | measured | ratio |")  # fmt: skip
    print("|---|---|" + "---:|" * 9)
    for words in arguments.model:
        name, _, path = words.partition("=")
        for method, grid in runs:
            report = measured(path, method, grid, arguments.samples, arguments.length)
            print(f"| {' | '.join(row(name, method, grid, report))} |", flush=True)


if __name__ == "__main__":
    main()
