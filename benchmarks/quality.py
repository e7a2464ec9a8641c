"""KL divergence at equal bits, side by side with peers: same model, same calibration tokens, same held-out tokens, one run.

    python benchmarks/quality.py --llmcompressor LC/bin/python --gptqmodel GM/bin/python

Peers run in environments of their own (benchmarks/peers/*.py say which versions); without them only halfbyte is measured.
Every folder, the peers' too, is read back by halfbyte and run in float32, so that only the weights differ.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import machine

import halfbyte
from halfbyte import demo
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint

CELLS = ["int4-g128", "int4-g128-asym", "int3-g128-asym", "int2-g128-asym"]
METHODS = ("minmax", "nearest", "imatrix", "awq", "gptq", "awq+gptq", "gptaq")
PEERS = Path(__file__).parent / "peers"


def peer(command: list[str]) -> bool:
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir(), check=False)
    if done.returncode:
        sys.stderr.write(f"{' '.join(command)}\n{done.stdout[-500:]}{done.stderr[-1500:]}\n")
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llmcompressor", help="a python that has it")
    parser.add_argument("--gptqmodel", help="a python that has it")
    parser.add_argument("--grids", nargs="*", default=CELLS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.md")
    a = parser.parse_args()
    lines = [
        "# KL divergence on bookworm-6m",
        "",
        f"`python benchmarks/quality.py --samples {a.samples} --windows {a.windows}` with both peers, on {machine()}.",
        "Groups of 128; KL in nats to the bf16 model,",
        f"{a.windows} windows of 512 held-out tokens, weights in float32; calibration {a.samples} windows of 512 tokens, the same for all.",
        "Bits per weight count scales and zero points (and g_idx, where a peer writes it). ± is the standard error over windows.",
        "",
        "| grid | tool and method | bits per weight | KL | perplexity | same top-1 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, calibrate.calibration(Checkpoint.open(demo.MODEL), "default", a.samples, 512, 0).tokens.numpy())
        for grid in a.grids:
            bits, asym = int(grid[3]), grid.partition("-g128")[2]
            folders: dict[str, Path] = {}
            for method in a.methods:
                folders[f"halfbyte {method}"] = out = Path(scratch) / f"{method}-{bits}{asym}"
                halfbyte.quantize(demo.MODEL, out, method=method, grid=f"int{bits}-g128{asym}", calibration={"samples": a.samples})
            kind = asym.strip("-") or "sym"
            if a.llmcompressor:
                for method in ("rtn", "gptq"):
                    out = Path(scratch) / f"lc-{method}-{bits}{asym}"
                    if peer([a.llmcompressor, str(PEERS / "llmcompressor_run.py"), str(demo.MODEL), str(out), method, str(bits), kind, str(tokens)]):
                        folders[f"llm-compressor 0.14 {method}"] = out
            if a.gptqmodel:
                out = Path(scratch) / f"gm-{bits}{asym}"
                if peer([a.gptqmodel, str(PEERS / "gptqmodel_run.py"), str(demo.MODEL), str(out), str(bits), kind, str(tokens)]):
                    folders["GPTQModel 7.7 gptq"] = out
            measured = halfbyte.evaluate(list(folders.values()), demo.MODEL, windows=a.windows)
            for (name, folder), row in zip(folders.items(), measured["models"], strict=True):
                size = next(k["bits_per_weight"] for stored, k in halfbyte.inspect(folder)["grids"].items() if stored.startswith("int"))
                loss = f"{row['kl']:.5f} ± {row['kl_error']:.5f} | {row['perplexity']:.3f} | {100 * row['same_top']:.2f}%"
                line = f"| int{bits}-g128{asym} | {name} | {size:.3f} | {loss} |"
                print(line, flush=True)
                lines.append(line)
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
