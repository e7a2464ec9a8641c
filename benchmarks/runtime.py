"""How fast models run, side by side in one run: halfbyte's packed linears in Transformers, llama.cpp, torch in
bfloat16, and bitsandbytes and torchao in Transformers where they are installed.

    python benchmarks/runtime.py --model smollm2=/tmp/smollm2 --model gemma3=/tmp/gemma3
    python benchmarks/runtime.py --no-synthetic --model smollm2=/tmp/smollm2 --prompt 64 --tokens 16 --out /tmp/x.md

Beside the models that are named, the synthetic Llama of 1.04 billion weights. GGUFs and folders are written by halfbyte
(`nearest`: values do not change the speed). To be run alone on a machine.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import synthetic
from measure import machine

import halfbyte
from halfbyte.inference.timing.bench import Asked, Contestant, contesting, measure
from halfbyte.inference.timing.engines import TimedEngine
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.progress import shown
from halfbyte.report.types import Runtime, Speeds

GRIDS = {"Q4_0": "{}.Q4_0.gguf", "Q4_K_M": "{}.Q4_K_M.gguf", "int4-g64": "{}-int4-g64", "nf4": "{}-nf4"}
STOCK = TimedEngine("transformers_run:StockTransformers", "transformers")
AO = TimedEngine("transformers_run:TorchAo", "transformers")
HERE = Path(__file__).parent
HEADS = ("file", "engine", "prefill, tokens/s", "first token, ms", "decode, tokens/s", "±", "times torch bf16: prefill",
         "decode", "of the bandwidth", "peak memory, MB", "load, s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="in 16 bits")
    parser.add_argument("--no-synthetic", action="store_true", help="only these")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--note", default="", help="what is to be known of this run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runtime.md")
    a = parser.parse_args()
    asked = Asked(a.batch, [a.prompt], a.tokens, a.repeats, a.threads, "cpu", ["exact", "int8"])
    sys.path.append(str(HERE / "peers"))  # where processes of peers find their classes
    with tempfile.TemporaryDirectory() as scratch:
        models = {} if a.no_synthetic else {"llama-1b": synthetic.make(Path(scratch, "llama-1b"))}
        models |= {name: Path(path) for name, _, path in (words.partition("=") for words in a.model)}
        command = " ".join(["python", *sys.argv])
        parts = [f"# How fast it runs\n\n`{command}`\n\n{' '.join([f'{machine()}.', a.note])}\n"]
        for name, path in models.items():
            parts.append(told(name, timed(name, path, Path(scratch), asked)))
            a.out.write_text("\n".join(parts))


def timed(name: str, model: Path, scratch: Path, asked: Asked) -> Speeds:
    files = {grid: scratch / file.format(name) for grid, file in GRIDS.items()}
    for grid, path in files.items():
        if not path.exists():
            halfbyte.quantize(model, path, method="nearest", grid=grid)
    original = Checkpoint.open(model)
    contestants = [
        contestant
        for grid in ("Q4_0", "Q4_K_M", "int4-g64")
        for contestant in contesting(Checkpoint.open(files[grid]), ["halfbyte", "llama.cpp"], asked)
    ]
    settings = {"device": "cpu", "vocabulary": original.text_config["vocab_size"]}
    if find_spec("bitsandbytes"):
        contestants.append(Contestant(Checkpoint.open(files["nf4"]), "bitsandbytes in Transformers", STOCK, settings))
    if find_spec("torchao"):
        contestants.append(Contestant(original, "torchao int4-g64 in Transformers", AO, settings))
    originals = [Contestant(original, "torch bf16 in Transformers", STOCK, settings)]
    originals += contesting(original, ["halfbyte"], asked)
    with shown(True) as show:
        return measure(contestants, originals, asked, {}, show)


def told(name: str, found: Speeds) -> str:
    m = found.machine
    products = ", ".join(f"{kind} {rate.median / 1e9:.0f}" for kind, rate in m.arithmetic.items())
    lines = [
        f"## {name}\n",
        f"{m.threads} threads; memory is read at {m.bandwidth.median / 1e9:.1f} GB/s ({m.bandwidth.low / 1e9:.1f} to "
        f"{m.bandwidth.high / 1e9:.1f}); products in billion operations a second: {products}. Prompts of "
        f"{found.models[0].paces[0].prompt} tokens, {found.tokens} decoded, the median of {found.repeats} repeats, "
        f"{'all in turn' if found.in_turn else 'one after another'}.\n",
        f"| batch | {' | '.join(HEADS)} |",
        f"|---:|---|---|{'---:|' * (len(HEADS) - 2)}",
    ]
    base = found.reference[0]
    for row in (*found.reference, *found.models):
        lines += [f"| {pace.batch} | {' | '.join(cells(row, number, base))} |" for number, pace in enumerate(row.paces)]
    called = {id(row): ", ".join(cells(row, 0, base)[:2]) for row in found.models}
    notes = [f"{called[id(row)]}: {text}" for row in found.models for text in (*row.reasons, *row.notes)]
    notes += [f"{one} failed: {why}" for one, why in found.failed.items()]
    lines += ["", *(f"- {note}" for note in (*notes, *found.warnings))]
    return "\n".join(lines) + "\n"


def cells(row: Runtime, number: int, base: Runtime) -> list[str]:
    pace, other = row.paces[number], base.paces[number]
    apart = (pace.decode.high - pace.decode.low) / 2 / pace.decode.median
    return [
        Path(row.path).name,
        row.engine + (f", {row.activations}" if row.activations else ""),
        f"{pace.prefill.median:.0f}",
        f"{1e3 * pace.first_token.median:.0f}",
        f"{pace.decode.median:.1f}",
        f"{100 * apart:.0f} %",
        f"{pace.prefill.median / other.prefill.median:.2f}",
        f"{pace.decode.median / other.decode.median:.2f}",
        "" if "torchao" in row.engine else f"{100 * (pace.decode_share or 0):.0f} %",
        f"{(row.memory_bytes or 0) / 1e6:.0f}",
        f"{row.load_seconds:.2f}",
    ]


if __name__ == "__main__":
    main()
