"""A report in a line, for terminals and notebooks."""

import html
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.terminal import duration

if TYPE_CHECKING:
    from halfbyte.report.types import Evaluation, Paired, Planned, Report, Resources, WeightReport

WORST = 5


def headline(report: "Planned") -> str:
    """Method, grid, container, size, and what was made of how much."""
    output, recipe = report.output, report.recipe
    per_weight = f"{output.bits_per_weight:.3f} bits per quantized weight, " if output.bits_per_weight else ""
    return (
        f"{recipe.method} {output.grid or recipe.grid} as {output.container}, "
        f"{size(output.size_bytes)} (was {size(report.source.size_bytes)}), "
        f"{per_weight}{output.bits_per_parameter:.3f} bits per parameter"
    )


def table(report: "Report") -> str:
    """HTML, for notebooks."""
    output = report.output
    lost = [row for row in worst(report, 1) if row.error]
    rows = {
        "method": report.recipe.method,
        "grid": report.recipe.grid,
        "container": output.container,
        "size": f"{size(output.size_bytes)} (was {size(report.source.size_bytes)})",
        "bits per parameter": f"{output.bits_per_parameter:.3f}",
        "worst weight": "".join(f"{row.name}, relative error of the {report.error_of} {row.error:.4f}" for row in lost),
        "notes": "; ".join(report.warnings),
    }
    cells = "".join(
        f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items() if value
    )
    return f"<table>{cells}</table>"


def measured(evaluation: "Evaluation") -> str:
    """What each model of an evaluation lost, in a line."""
    rows = (f"{Path(row.path).name}: KL {row.kl:.5f}, perplexity {row.perplexity:.3f}" for row in evaluation.models)
    return f"{'; '.join(rows)} (was {evaluation.reference.perplexity:.3f})"


def measured_table(evaluation: "Evaluation") -> str:
    """HTML, for notebooks: a row for each model."""
    original = ("original", "", f"{evaluation.reference.perplexity:.3f}", "")
    rows = [
        (Path(row.path).name, f"{row.kl:.5f}", f"{row.perplexity:.3f}", f"{100 * row.same_top:.2f} %")
        for row in evaluation.models
    ]
    heads = "".join(f"<th>{name}</th>" for name in ("model", "KL, nats", "perplexity", "same next word"))
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in (original, *rows))
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def worst(report: "Report", count: int = WORST) -> "list[WeightReport]":
    """The weights that lost most."""
    return sorted(report.weights, key=lambda row: -row.error)[:count]


def worst_activations(report: "Report", count: int = WORST) -> "list[WeightReport]":
    """Of the activations with the largest errors, the first of the weights that they are multiplied by."""
    by_activations = {repr(row.activations): row for row in reversed(report.weights) if row.activations}
    return sorted(by_activations.values(), key=lambda row: -row.activations.error if row.activations else 0.0)[:count]


def passed(row: "Paired") -> str:
    """How many of the items the original and the model got right."""
    if row.original is None or row.model is None:
        return ""
    return f"{row.original * row.items:.0f} → {row.model * row.items:.0f} of {row.items}"


def in_words(planned: "Resources") -> str:
    """Memory, that of a GPU, disk, and how long it takes, before a run."""
    parts = {"memory": planned.memory_bytes, "the GPU's": planned.device_bytes, "disk": planned.disk_bytes}
    amounts = [f"{size(value)} of {name}" for name, value in parts.items() if value is not None]
    return ", ".join(amounts + ([f"about {duration(planned.seconds)}"] if planned.seconds is not None else []))


def beside_planned(measured: "Resources", planned: "Resources") -> str:
    """What a run took, each with what was planned."""
    rows = {
        "memory": (measured.memory_bytes, planned.memory_bytes, size),
        "the GPU's memory": (measured.device_bytes, planned.device_bytes, size),
        "disk": (measured.disk_bytes, planned.disk_bytes, size),
        "time": (measured.seconds, planned.seconds, duration),
    }
    return ", ".join(
        f"{name} {'not measured' if took is None else shown(took)}{'' if was is None else f' (planned {shown(was)})'}"
        for name, (took, was, shown) in rows.items()
        if (took, was) != (None, None)
    )


def size(size_bytes: float) -> str:
    """Bytes in MB or GB, of powers of ten."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"
