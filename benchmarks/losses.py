"""What each scheme that `halfbyte plan` lists loses: every one made as its command makes it, of one model, and measured
on one text. Prints the rows of sizing/losses.yaml.

    python benchmarks/losses.py MODEL --name SmolLM2-135M-Instruct --out benchmarks/results/losses-smollm2.md

With another number of calibration samples than the default, the rows say so.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measure import machine

import halfbyte
from halfbyte.sizing.choices import PLAIN, Choice, choices


class Lost(NamedTuple):
    """One scheme's row."""

    scheme: str
    method: str
    bits: float
    """Per weight, everything counted."""
    kl: float
    error: float


def schemes(pattern: str) -> dict[str, tuple[str, Choice]]:
    """Each once, with an engine that it is for."""
    found: dict[str, tuple[str, Choice]] = {}
    for engine, of_engine in choices().items():
        for name, choice in of_engine.items():
            if name != PLAIN and re.search(pattern, name):
                found.setdefault(name, (engine, choice))
    return found


def measured(model: Path, windows: int, samples: int | None, pattern: str) -> Iterator[Lost]:
    """Refused schemes are left out, with the reason on standard error."""
    calibration = {"samples": samples} if samples else None
    with tempfile.TemporaryDirectory() as home:
        for scheme, (engine, choice) in schemes(pattern).items():
            out = Path(home) / (f"{scheme}.gguf" if choice.recipe.get("to") == "gguf" else scheme)
            try:
                made = halfbyte.quantize(model, out, engine=engine, calibration=calibration, **choice.recipe)
            except halfbyte.HalfbyteError as error:
                print(f"{scheme}: {error}", file=sys.stderr, flush=True)
                continue
            loss = halfbyte.evaluate(out, model, windows=windows).models[0]
            method = made.recipe.method + (f", {samples} samples" if samples and made.calibration else "")
            yield Lost(scheme, method, made.output.bits_per_parameter, loss.kl, loss.kl_error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True, help="what the tables call the model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, help="of calibration")
    parser.add_argument("-k", dest="pattern", default="", help="only schemes that match this regular expression")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    parameters = halfbyte.inspect(a.model).parameters
    more = "".join(f" {flag} {word}" for flag, word in (("--samples", a.samples), ("-k", a.pattern)) if word)
    lines = [
        f"# What each scheme loses on {a.name}",
        "",
        f"`python benchmarks/losses.py MODEL --windows {a.windows}{more}`, {machine()};",
        f"{parameters / 1e6:.1f} million parameters. Calibration and held-out text are halfbyte's own. Bits are of the",
        "whole file, per parameter; KL in nats per token.",
        "",
        "| scheme | method | bits | KL | ± |",
        "|---|---|---:|---:|---:|",
    ]
    for lost in measured(a.model, a.windows, a.samples, a.pattern):
        lines.append(f"| {lost.scheme} | {lost.method} | {lost.bits:.2f} | {lost.kl:.5f} | {lost.error:.5f} |")
        a.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = f"scheme: {lost.scheme}, model: {a.name}, parameters: {parameters:.3g}, kl: {lost.kl:.5f}"
        print(f'- {{{source}, method: "{lost.method}", source: benchmarks/results/{a.out.name}}}', flush=True)


if __name__ == "__main__":
    main()
