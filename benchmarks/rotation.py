"""What a rotation of hidden states is worth: each method with and without it, on the same tokens, bytes counted.

python benchmarks/rotation.py
python benchmarks/rotation.py --outliers --grids w4a4 w4a8 w8a8
python benchmarks/rotation.py --model smollm2 --windows 32 --samples 32
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import machine

import halfbyte
from halfbyte import demo
from halfbyte.words import PRESETS

GRIDS = (
    "w4a4", "w4a4-mxfp4", "w4a4-nvfp4", "w4a8", "w8a8", "int4-g128", "int3-g128-asym", "int2-g128-asym", "mxfp4",
    "nvfp4", "Q3_K_S",
)  # fmt: skip
METHODS = ("nearest", "gptq")


def measured(model: Path, grid: str, scratch: Path, a: argparse.Namespace) -> list[str]:
    """A row of the table for each method, plain and rotated."""
    place, ending = scratch / grid, ".gguf" if grid in PRESETS else ""
    outs = {name: place / f"{name}{ending}" for method in a.methods for name in (method, f"rotate+{method}")}
    place.mkdir()
    for name, out in outs.items():
        halfbyte.quantize(
            model,
            out,
            method=name,
            grid=grid,
            calibration={"samples": a.samples},
            smaller_groups=None if ending else True,
        )
    found = halfbyte.evaluate(list(outs.values()), model, windows=a.windows)
    rows = []
    for (name, out), row in zip(outs.items(), found["models"], strict=True):
        size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.glob("*.safetensors")))
        rows.append(f"| {grid} | {name} | {size / 1e6:.2f} | {row['kl']:.5f} ± {row['kl_error']:.5f} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--grids", nargs="*", default=GRIDS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--outliers", action="store_true", help="on its twin with outlier channels (tests/outliers.py)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a file for the table")
    a = parser.parse_args()
    lines = [f"`python benchmarks/rotation.py {' '.join(sys.argv[1:])}`, on {machine()}", "",
             "| grid | method | MB | KL, nats |", "|---|---|---:|---:|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        model = a.model
        if a.outliers:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            from outliers import twin

            model = twin(a.model, Path(scratch) / "twin")
        for grid in a.grids:
            lines += measured(model, grid, Path(scratch), a)
    if a.out:
        a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
