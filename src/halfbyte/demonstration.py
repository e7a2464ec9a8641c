"""The demonstration: one small model, several methods, one table."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from halfbyte import api, demo, pipeline
from halfbyte.errors import BadRequest
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.recipe import Calibration, Recipe
from halfbyte.report.types import DemoRow, Divergence, Evaluation, Report

RUNS = [
    ("minmax", "int4-g128", "compressed-tensors"),
    ("nearest", "int4-g128", "compressed-tensors"),
    ("gptq", "int4-g128", "compressed-tensors"),
    ("awq", "int4-g128-asym", "awq"),
    ("nearest", "int3-g128", "compressed-tensors"),
    ("gptq", "int3-g128", "compressed-tensors"),
    ("nearest", "nf4", "bitsandbytes"),
    ("nearest", "fp8", "compressed-tensors"),
    ("smoothquant+gptq", "w8a8", "compressed-tensors"),
    ("nearest", "Q4_K_M", "gguf"),
    ("gptq", "Q4_K_M", "gguf"),
    ("gptq", "Q2_K", "gguf"),
]


def _require_own(folder: Path) -> None:
    """Raise BadRequest for a folder that holds anything but what an earlier demonstration has left there."""
    ours = tuple(f"{method}-{grid}-{container}" for method, grid, container in RUNS)
    if folder.exists() and not (folder.is_dir() and all(path.name.startswith(ours) for path in folder.iterdir())):
        raise BadRequest(f"{folder} holds other things than a demonstration's folders; name one that is new or empty")


def rows(folder: Path, samples: int, windows: int, progress: Callable[[str, float, float], None]) -> list[DemoRow]:
    """Quantize with every method, then measure them all in one pass over the held-out text."""
    _require_own(folder)
    reports, calibration = [], Calibration(samples=samples)
    drawn = calibrate.calibration(Checkpoint.open(demo.MODEL), calibration)  # once: it takes as long as some runs
    for number, (method, grid, container) in enumerate(RUNS):
        progress(f"{method} {grid}", number, len(RUNS) + 1)
        out = folder / f"{method}-{grid}-{container}"
        recipe = Recipe(model=str(demo.MODEL), method=method, grid=grid, to=container, calibration=calibration)
        reports.append((out, pipeline.quantize(recipe, out, overwrite=True, samples=drawn)))
    progress("measuring", len(RUNS), len(RUNS) + 1)
    measured = cast(Evaluation, api.evaluate([out for out, _ in reports], demo.MODEL, windows=windows))
    original = DemoRow(
        method="original",
        grid="",
        container="",
        bits_per_weight=16.0,
        size_bytes=reports[0][1].source.size_bytes,
        kl=0.0,
        kl_error=0.0,
        same_top=1.0,
        perplexity=measured.reference.perplexity,
        seconds=0.0,
    )
    return [original, *(_row(report, row) for (_, report), row in zip(reports, measured.models, strict=True))]


def _row(report: Report, measured: Divergence) -> DemoRow:
    return DemoRow(
        method=report.recipe.method,
        grid=report.recipe.grid,
        container=report.output.container,
        bits_per_weight=report.output.bits_per_weight or 16.0,
        size_bytes=report.output.size_bytes,
        kl=measured.kl,
        kl_error=measured.kl_error,
        same_top=measured.same_top,
        perplexity=measured.perplexity,
        seconds=report.seconds,
    )
