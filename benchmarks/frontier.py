"""Mixes under a budget side by side with uniform types and llama.cpp's presets: KL divergence at the same bytes.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --model MODEL --presets Q4_K_M --types --candidates Q2_K,Q3_K,Q4_K,Q5_K,Q6_K
    python benchmarks/frontier.py --alone Q2_K Q4_K_M

Every file is a GGUF that gptq makes from the same calibration; of each that a preset or a type makes, a mix of at most
as many bytes is made (`halfbyte.quantize(..., size=bytes)`), and both are measured on the same held-out text. With
`--alone`, each weight of a preset's file is put alone into the original (in Transformers), and its KL stands beside
what was predicted of it.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from scipy.stats import spearmanr

import halfbyte
from halfbyte import demo
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.types import Report

PRESETS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M")
TYPES = ("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")
HEAD = """| bytes | uniform or preset | KL | mix at most as large | predicted KL | measured KL | mix / uniform |
|---:|---|---:|---|---:|---:|---:|"""
ALONE = """| file | rank correlation | measured / predicted, median | sum predicted | sum measured |
|---|---:|---:|---:|---:|"""


def rows(asked: argparse.Namespace, names: dict[str, bool], scratch: Path) -> Iterator[str]:
    """Rows of the table, as they come; `names` of presets and types, and whether all tensors get that type."""
    model, windows = asked.model, asked.windows
    words = {"calibration": {"samples": asked.samples}, "overwrite": True}
    limits = {"candidates": asked.candidates, "sensitivities": asked.sensitivities}
    for name, pure in names.items():
        uniform, mix = scratch / "uniform.gguf", scratch / "mix.gguf"
        halfbyte.quantize(model, uniform, grid=name, pure=pure, **words)
        taken = uniform.stat().st_size
        made = halfbyte.quantize(model, mix, size=taken, **limits, **words)
        assert isinstance(made, Report)
        assert made.budget
        assert mix.stat().st_size <= taken
        theirs, ours = halfbyte.evaluate([uniform, mix], model, windows=windows).models
        grids = ", ".join(f"{grid} x {count}" for grid, count in made.budget.grids.items())
        yield (
            f"| {taken:,} | {name}{', all tensors' if pure else ''} | {theirs.kl:.5f} ± {theirs.kl_error:.5f} "
            f"| {grids} | {made.budget.predicted_kl:.5f} | {ours.kl:.5f} ± {ours.kl_error:.5f} "
            f"| {ours.kl / theirs.kl:.2f} |"
        )


@torch.no_grad()
def alone(folder: Path, preset: str, samples: int, windows: int, scratch: Path) -> str:
    """A row: how well what was predicted of each weight agrees with what it costs alone."""
    uniform, costs, calibration = scratch / "alone.gguf", scratch / "costs.jsonl", {"samples": samples}
    halfbyte.quantize(folder, uniform, grid=preset, calibration=calibration, overwrite=True)
    halfbyte.quantize(folder, scratch / "any.gguf", bits=5, sensitivities=costs, calibration=calibration, dry_run=True)
    lines = [json.loads(line) for line in costs.read_text().splitlines()[1:]]
    losses = {line["weight"]: {name.lower(): loss for name, loss in line["losses"].items()} for line in lines}
    original, quantized = Checkpoint.open(folder), Checkpoint.open(uniform)
    texts = calibrate.evaluation(original, str(demo.HELDOUT), 512, windows).tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    said = [model(text[None]).logits.log_softmax(-1) for text in texts]
    predicted, measured = [], []
    for weight in quantized.weights(embedding=True):
        grid = str(quantized.quantized[weight.name][0].weight)
        parameter = parameters[weight.tensor]
        own = parameter.data.clone()
        parameter.data.copy_(quantized.read_weight(weight))
        now = [model(text[None]).logits.log_softmax(-1) for text in texts]
        measured.append(
            float(sum((a.exp() * (a - b)).sum(-1).mean() for a, b in zip(said, now, strict=True))) / windows
        )
        predicted.append(losses[weight.name][grid])
        parameter.data.copy_(own)
    ratio = torch.tensor(measured).div(torch.tensor(predicted)).median()
    rank = spearmanr(predicted, measured).statistic
    return f"| {preset} | {rank:.3f} | {ratio:.2f} | {sum(predicted):.4f} | {sum(measured):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--samples", type=int, default=64, help="of calibration, of 512 tokens")
    parser.add_argument("--windows", type=int, default=32, help="of held-out text, of 512 tokens")
    parser.add_argument("--candidates", help="for mixes; by default all that a GGUF has")
    parser.add_argument("--sensitivities", type=Path, help="the file of what each weight costs, to go on with")
    parser.add_argument("--alone", nargs="*", help="presets of K-quants, each weight by itself")
    asked = parser.parse_args()
    if asked.alone:
        with tempfile.TemporaryDirectory() as scratch:
            print(ALONE, flush=True)
            for preset in asked.alone:
                print(alone(asked.model, preset, asked.samples, asked.windows, Path(scratch)), flush=True)
        return
    print(HEAD, flush=True)
    names = {**dict.fromkeys(asked.presets, False), **dict.fromkeys(asked.types, True)}
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(asked, names, Path(scratch)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
