"""GGUF side by side with llama-quantize: time and memory on a Llama of a billion weights, KL divergence on bookworm-6m.

    python benchmarks/llama_quantize.py --llama-cpp LC/bin/python

llama.cpp runs in the environment of that python (benchmarks/peers/llama_cpp_run.py says what it needs); without it only
halfbyte is measured. Its source is a BF16 GGUF that halfbyte wrote; making one is not in its time. halfbyte reads the
safetensors themselves. In the quality table both read the same tokens: llama.cpp gets an importance matrix of the
calibration windows that halfbyte gets. Every file is read back by halfbyte and run in float32, so that only the weights
differ.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Cost, machine, run
from speed import COPY, START

import halfbyte
from halfbyte import demo
from halfbyte.targets.gguf.names import PRESETS

SPEED = ("Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "Q2_K", "IQ4_XS")
QUALITY = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_XXS")
METHODS = ("nearest", "imatrix", "gptq")
THREADS = 2
HERE = Path(__file__).parent


def llama_quantize(python: str, source: Path, target: Path, preset: str, matrix: Path | None = None) -> Cost:
    options = [str(matrix)] if matrix else []
    return run(
        [
            python,
            str(HERE / "peers" / "llama_cpp_run.py"),
            str(source),
            str(target),
            str(PRESETS[preset].file_type),
            str(THREADS),
            *options,
        ]
    )


def speed(peer: str | None, presets: list[str], layers: int, scratch: Path) -> Iterator[str]:
    """Rows of the table of costs, as they come."""
    model, out, whole = scratch / "model", scratch / "out.gguf", scratch / "bf16.gguf"
    run(
        [sys.executable, str(HERE / "synthetic.py"), str(model), "--layers", str(layers)]
    )  # a process of its own: a child's peak starts at its parent's

    def row(name: str, cost: Cost) -> str:
        size = f"{out.stat().st_size / 1e6:.0f}" if out.exists() else ""
        out.unlink(missing_ok=True)
        return f"| {name} | {size} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.peak_mb:.0f} |"

    def ours(preset: str, target: Path, method: str = "nearest") -> Cost:
        words = [
            "quantize",
            str(model),
            "-o",
            str(target),
            "--to",
            "gguf",
            "--grid",
            preset,
            "--method",
            method,
            "--json",
        ]
        return run(
            [sys.executable, "-m", "halfbyte", *words], NUMBA_NUM_THREADS=str(THREADS), OMP_NUM_THREADS=str(THREADS)
        )

    ours(presets[0], out)  # compiles what Numba then has in its cache
    out.unlink()
    yield row(
        "bytes read and written, nothing else",
        run([sys.executable, "-c", COPY, str(model), str(scratch / "copy"), "4.5"]),
    )
    (scratch / "copy").unlink()
    yield row("python that imports torch, numba, transformers", run([sys.executable, "-c", START]))
    if peer:
        ours("BF16", whole)
        yield row("python that imports llama_cpp", run([peer, "-c", "import llama_cpp"]))
    for preset in presets:
        yield row(f"halfbyte nearest {preset}", ours(preset, out))
        if peer:
            yield row(f"llama-quantize {preset}", llama_quantize(peer, whole, out, preset))


def quality(peer: str | None, presets: list[str], samples: int, windows: int, scratch: Path) -> Iterator[str]:
    """Rows of the table of losses, preset by preset."""
    matrix, whole = scratch / "imatrix.gguf", scratch / "original.gguf"
    halfbyte.imatrix(demo.MODEL, matrix, calibration={"samples": samples})
    halfbyte.quantize(demo.MODEL, whole, method="nearest", grid="BF16", to="gguf")
    for preset in presets:
        files: dict[str, Path] = {}
        for method in METHODS:
            files[f"halfbyte {method}"] = out = scratch / f"{preset}-{method}.gguf"
            halfbyte.quantize(demo.MODEL, out, method=method, grid=preset, to="gguf", calibration={"samples": samples})
        if peer:
            for name, given in (("llama-quantize", None), ("llama-quantize, imatrix", matrix)):
                if given or not preset.startswith(("IQ1", "IQ2", "IQ3_XXS")):  # which it does not make without one
                    files[name] = out = scratch / f"{preset}-{name.replace(', ', '-')}.gguf"
                    llama_quantize(peer, whole, out, preset, given)
        measured = halfbyte.evaluate([whole, *files.values()], demo.MODEL, windows=windows)["models"]
        assert measured[0]["kl"] < 1e-9, "the BF16 file is not the model"
        for (name, path), result in zip(files.items(), measured[1:], strict=True):
            loss = (
                f"{result['kl']:.5f} ± {result['kl_error']:.5f} | {result['perplexity']:.3f} | "
                f"{100 * result['same_top']:.2f}%"
            )
            yield f"| {preset} | {name} | {path.stat().st_size / 1e6:.3f} | {loss} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", help="a python that has it")
    parser.add_argument("--speed", nargs="*", default=SPEED, help="presets to time")
    parser.add_argument("--quality", nargs="*", default=QUALITY, help="presets to evaluate")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gguf.md")
    a = parser.parse_args()
    lines = [
        "# GGUF, side by side with llama-quantize",
        "",
        f"`python benchmarks/llama_quantize.py` with llama.cpp as in llama-cpp-python 0.3.36, on {machine()}.",
    ]

    def table(title: str, about: list[str], header: list[str], rows: Iterator[str]) -> None:
        left = header.index("MB")  # columns before it are words
        rule = ["---" if number < left else "---:" for number in range(len(header))]
        lines.extend(["", f"## {title}", "", *about, "", f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|"])
        for row in rows:
            print(row, flush=True)
            lines.append(row)
        a.out.parent.mkdir(exist_ok=True)
        a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if a.speed:
            about = [
                f"{a.layers} layers of a 1-billion-parameter Llama. Whole processes of {THREADS} threads, one run "
                "each, one after the other; halfbyte reads",
                "safetensors, llama-quantize a BF16 GGUF that was made before.",
            ]
            table(
                "Time and memory",
                about,
                ["what", "MB", "wall s", "processor s", "peak MB"],
                speed(a.llama_cpp, list(a.speed), a.layers, scratch),
            )
        if a.quality:
            about = [
                f"bookworm-6m; KL in nats to the bf16 model, {a.windows} windows of 512 held-out tokens, weights in "
                f"float32; calibration {a.samples} windows",
                "of 512 tokens, the same for both tools. ± is the standard error over windows. llama-quantize gives "
                "some tensors other types when it has an",
                "importance matrix, so its files may differ in size.",
            ]
            header = ["preset", "tool and method", "MB", "KL", "perplexity", "same top-1"]
            table("KL divergence", about, header, quality(a.llama_cpp, list(a.quality), a.samples, a.windows, scratch))


if __name__ == "__main__":
    main()
