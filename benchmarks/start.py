"""What a start costs: whole processes that print a few lines, before and after Python has compiled its modules; and on
a small model, with an empty cache of compiled kernels and with a full one.

    python benchmarks/start.py

Processor seconds: wall seconds of a start depend on who else is there.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Cost, machine, run

from halfbyte import demo

WORDS = (["--help"], ["quantize", "--help"], ["devices", "rtx-4090"])
TRIES = 9
RUNS = [("nearest", "int4-g128", "out"), ("nearest", "Q4_K_M", "out.gguf"), ("gptq", "int4-g128", "out")]


def starts(words: list[str]) -> tuple[float, float]:
    """Processor seconds before and after Python has compiled the modules, of these the median."""
    command = [sys.executable, "-m", "halfbyte", *words]
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = (
            run(command, PYTHONPYCACHEPREFIX=folder, PYTHONDONTWRITEBYTECODE="").cpu for _ in range(1 + TRIES)
        )
    return cold, statistics.median(warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start.md")
    a = parser.parse_args()
    rows: list[tuple[str, Cost, Cost]] = []
    words = [(" ".join(asked), *starts(asked)) for asked in WORDS]
    with tempfile.TemporaryDirectory() as folder:
        for method, grid, name in RUNS:
            command = [
                sys.executable,
                "-m",
                "halfbyte",
                "quantize",
                str(demo.MODEL),
                "-o",
                f"{folder}/{name}",
                "--method",
                method,
                "--grid",
                grid,
            ]
            cold, warm = (
                run([*command, "--samples", "8", "--overwrite", "--json"], NUMBA_CACHE_DIR=f"{folder}/{method}-{grid}")
                for _ in range(2)
            )
            rows.append((f"quantize --method {method} --grid {grid}", cold, warm))
    lines = [
        "# What a start costs",
        "",
        f"`python benchmarks/start.py` on {machine()}; bookworm-6m, 8 calibration windows of 512 tokens. Processor "
        "seconds of whole processes.",
        "",
        f"| | no module compiled yet | compiled before (median of {TRIES}) |",
        "|---|---:|---:|",
        *(f"| {name} | {cold:.2f} | {warm:.2f} |" for name, cold, warm in words),
        "",
        "| | no kernel compiled yet | compiled before | compiling |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {cold.cpu:.1f} | {warm.cpu:.1f} | {cold.cpu - warm.cpu:.1f} |" for name, cold, warm in rows),
    ]
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
