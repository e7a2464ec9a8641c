"""KL divergence at equal bits, side by side with peers: same model, same calibration tokens, same held-out tokens, one
run.

    python benchmarks/quality.py --llmcompressor LC/bin/python --gptqmodel GM/bin/python
    python benchmarks/quality.py --llmcompressor LC/bin/python --outliers \\
        --grids int8-channel/int8-token --out outliers.md

Peers run in environments of their own (benchmarks/peers/*.py say which versions); without them only halfbyte is
measured. Every folder, the peers' too, is read back by halfbyte and run in float32 with inputs rounded as the folder
says, so that nothing but what is stored differs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import machine

import halfbyte
from halfbyte import demo
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint

ROOT = Path(__file__).parent
PEERS = ROOT / "peers"


class Methods(NamedTuple):
    """What is compared on a grid, by the names of each tool."""

    halfbyte: tuple[str, ...]
    llmcompressor: tuple[str, ...]
    gptqmodel: tuple[str, ...] = ()


WEIGHTS = Methods(("minmax", "nearest", "imatrix", "awq", "gptq", "awq+gptq", "gptaq"), ("rtn", "gptq"), ("gptq",))
INTEGERS = Methods(
    ("nearest", "gptq", "smoothquant", "smoothquant+gptq"), ("rtn", "gptq", "smoothquant+rtn", "smoothquant+gptq")
)
FLOATS = Methods(("nearest", "gptq"), ("rtn",))
CELLS: dict[str, Methods] = {
    **dict.fromkeys(("int4-g128", "int4-g128-asym", "int3-g128-asym", "int2-g128-asym"), WEIGHTS),
    **dict.fromkeys(("int8-channel/int8-token", "int8-channel/int8-static"), INTEGERS),
    **dict.fromkeys(("fp8-e4m3-channel/fp8-e4m3-token", "nvfp4/nvfp4"), FLOATS),
}


def peer(command: list[str]) -> bool:
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir(), check=False
    )
    if done.returncode:
        sys.stderr.write(f"{' '.join(command)}\n{done.stdout[-500:]}{done.stderr[-1500:]}\n")
    return done.returncode == 0


def folders_of(grid: str, model: Path, scratch: Path, tokens: Path, a: argparse.Namespace) -> dict[str, Path]:
    """The model on a grid by each tool and method, as far as they succeed."""
    methods, folders = CELLS[grid], {}
    place = scratch / grid.replace("/", "_")
    for method in methods.halfbyte:
        folders[f"halfbyte {method}"] = out = place / method
        halfbyte.quantize(model, out, method=method, grid=grid, calibration={"samples": a.samples})
    for method in methods.llmcompressor if a.llmcompressor else ():
        out = place / f"llmcompressor-{method}"
        if peer(
            [a.llmcompressor, str(PEERS / "llmcompressor_run.py"), str(model), str(out), method, grid, str(tokens)]
        ):
            folders[f"llm-compressor 0.14 {method}"] = out
    for method in methods.gptqmodel if a.gptqmodel else ():
        out = place / f"gptqmodel-{method}"
        bits, kind = grid[3], "asym" if grid.endswith("asym") else "sym"
        if peer([a.gptqmodel, str(PEERS / "gptqmodel_run.py"), str(model), str(out), bits, kind, str(tokens)]):
            folders[f"GPTQModel 7.7 {method}"] = out
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", help="a python that has it")
    parser.add_argument("--gptqmodel", help="a python that has it")
    parser.add_argument("--grids", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument(
        "--outliers", action="store_true", help="on the model's twin with outlier channels (tests/outliers.py)"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "quality.md")
    a = parser.parse_args()
    lines = [
        f"# KL divergence on bookworm-6m{', its twin with outlier channels' if a.outliers else ''}",
        "",
        f"`python benchmarks/quality.py --samples {a.samples} --windows "
        f"{a.windows}{' --outliers' if a.outliers else ''}` with peers, on {machine()}.",
        "KL in nats to the bf16 model,",
        f"{a.windows} windows of 512 held-out tokens, run in float32 with inputs rounded as the folder says;",
        f"calibration {a.samples} windows of 512 tokens, the same for all. llm-compressor's smoothing strength is "
        ".8, halfbyte's is searched.",
        "Bits per weight count scales and zero points (and g_idx, where a peer writes it). ± is the standard error "
        "over windows.",
        "",
        "| grid | tool and method | bits per weight | KL | perplexity | same top-1 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens = demo.MODEL, Path(scratch) / "tokens.npy"
        if a.outliers:
            sys.path.append(str(ROOT.parent / "tests"))
            from outliers import twin

            model = twin(demo.MODEL, Path(scratch) / "twin")
        np.save(tokens, calibrate.calibration(Checkpoint.open(demo.MODEL), "default", a.samples, 512, 0).tokens.numpy())
        for grid in a.grids:
            folders = folders_of(grid, model, Path(scratch), tokens, a)
            measured = halfbyte.evaluate(list(folders.values()), demo.MODEL, windows=a.windows, foreign=a.outliers)
            for (name, folder), row in zip(folders.items(), measured["models"], strict=True):
                size = min(
                    k["bits_per_weight"] for k in halfbyte.inspect(folder)["grids"].values()
                )  # the rest is in 16 bits
                loss = (
                    f"{row['kl']:.5f} ± {row['kl_error']:.5f} | {row['perplexity']:.3f} | {100 * row['same_top']:.2f}%"
                )
                line = f"| {grid} | {name} | {size:.3f} | {loss} |"
                print(line, flush=True)
                lines.append(line)
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
