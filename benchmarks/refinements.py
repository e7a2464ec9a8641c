"""What each method loses on a grid, and what it takes: solvers, what goes before them and what refines them.

    python benchmarks/refinements.py --grids int3-g128-asym int2-g128-asym
    python benchmarks/refinements.py --model /tmp/smollm2 --grids int3-g64 --methods gptq gptaq learned --samples 32

KL divergence to the original on held-out text, of files of the same size; processor seconds of quantizing, all threads.
"""

import argparse
import tempfile
import time
from pathlib import Path

from measure import machine

import halfbyte
from halfbyte import demo

RESULTS = Path(__file__).parent / "results"
METHODS = ("gptq", "gptaq", "descent", "guided+gptaq", "learned", "gptaq+polish", "learned+polish")
GRIDS = ("int4-g128-asym", "int3-g128-asym", "int2-g128-asym")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--grids", nargs="*", default=GRIDS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--samples", type=int, default=128, help="of calibration, 512 tokens each")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, 512 tokens each")
    parser.add_argument("--out", type=Path, default=RESULTS / "refinements.md")
    a = parser.parse_args()
    lines = [
        f"# What methods lose on {a.model.name if a.model != demo.MODEL else 'bookworm-6m'}\n",
        f"{machine()}. {a.samples} windows of calibration, {a.windows} held out, 512 tokens each. ± is the standard "
        "error over windows.\n",
        "| grid | method | KL | share of the first | perplexity | processor seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for grid in a.grids:
        with tempfile.TemporaryDirectory() as scratch:
            took = {}
            for method in a.methods:
                began = time.process_time()
                halfbyte.quantize(
                    a.model, Path(scratch, method), method=method, grid=grid, calibration={"samples": a.samples},
                    engine="none",
                )  # fmt: skip
                took[method] = time.process_time() - began
            rows = halfbyte.evaluate([Path(scratch, method) for method in a.methods], a.model, windows=a.windows)[
                "models"
            ]
            for method, row in zip(a.methods, rows, strict=True):
                kl, error, share = row["kl"], row["kl_error"], row["kl"] / rows[0]["kl"]
                loss = f"{kl:.5f} ± {error:.5f} | {share:.2f} | {row['perplexity']:.3f}"
                lines.append(f"| {grid} | {method} | {loss} | {took[method]:.0f} |")
                print(lines[-1], flush=True)
        a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
