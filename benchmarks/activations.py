"""What it costs to multiply packed weights by activations of 8 bits: the KL divergence beside that of quantizing.

    python benchmarks/activations.py > benchmarks/results/activations.md
    python benchmarks/activations.py --model smollm2=/tmp/smollm2 --grids int4-g128 Q4_K_M

Each model is rounded to nearest, loaded twice, and reads held-out text a few tokens at a time, as where it answers
(prompts of many tokens are multiplied by decoded weights, and their activations are not rounded). All in bfloat16.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import machine
from torch.nn import functional

import halfbyte
from halfbyte import demo
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint

STEP = 8
"""Tokens that are read at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="beside bookworm-6m")
    parser.add_argument("--grids", nargs="+", default=["int4-g128", "int8-g32", "nvfp4", "Q4_K_M", "Q2_K"])
    parser.add_argument("--text", type=Path, default=demo.HELDOUT)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    models = {"bookworm-6m": str(demo.MODEL)} | dict(words.split("=", 1) for words in asked.model)
    print(
        f"# Activations of 8 bits\n\n{machine()}; {asked.windows} windows of {asked.tokens} tokens, {STEP} at a time.\n"
    )
    print("| model | grid | KL of quantizing | KL of int8 activations | KL of both |\n|---|---|---:|---:|---:|")
    for name, path in models.items():
        tokens = windows(path, asked.text.read_text(encoding="utf-8"), asked.windows, asked.tokens)
        original = answers(halfbyte.load(path, "bfloat16"), tokens)
        for grid in asked.grids:
            exact, rounded = quantized(path, grid, tokens)
            cells = (divergence(a, b) for a, b in ((original, exact), (exact, rounded), (original, rounded)))
            print(f"| {name} | {grid} | {' | '.join(f'{cell:.5f}' for cell in cells)} |", flush=True)


def windows(path: str, text: str, count: int, size: int) -> torch.Tensor:
    """[windows, tokens]"""
    tokenizer = calibrate.tokenizer_of(Checkpoint.open(path))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * size]).view(count, size)


def quantized(path: str, grid: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """With activations as they are, and with rounded ones."""
    with tempfile.TemporaryDirectory() as folder:
        is_gguf = grid[0] == "Q"
        out = Path(folder, "out.gguf" if is_gguf else "out")
        halfbyte.quantize(path, out, method="nearest", grid=grid, engine="none")
        return [answers(halfbyte.load(out, "bfloat16", activations=way), tokens) for way in ("exact", "int8")]


def answers(model, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of what comes next, [windows, tokens, vocabulary] in half precision."""
    read = []
    for window in tokens[:, None]:
        cache, parts = None, []
        for part in window.split(STEP, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(functional.log_softmax(out.logits[0].float(), -1))
        read.append(torch.cat(parts).half())
    return torch.stack(read)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence in nats."""
    sums = [
        functional.kl_div(b.float(), a.float(), log_target=True, reduction="sum")
        for a, b in zip(wanted, found, strict=True)
    ]
    return float(sum(sums)) / wanted[..., 0].numel()


if __name__ == "__main__":
    main()
