"""A report in a line, for terminals and notebooks."""

import html
from typing import Any


class Report(dict[str, Any]):
    """What report.json holds. Shown in one line, and as a small table in notebooks; `dict(report)` shows all of it."""

    def __repr__(self) -> str:
        return f"<Report: {headline(self)}>"

    def _repr_html_(self) -> str:
        output = self["output"]
        rows = {
            "method": self["recipe"]["method"],
            "grid": self["recipe"]["grid"],
            "container": output["container"],
            "size": f"{size(output['size_bytes'])} (was {size(self['source']['size_bytes'])})",
            "bits per parameter": f"{output['bits_per_parameter']:.3f}",
            "worst weight": worst_of(self),
            "notes": "; ".join(self["warnings"]),
        }
        cells = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items() if value
        )
        return f"<table>{cells}</table>"


def headline(report: dict[str, Any]) -> str:
    """Method, grid, container, size, and what was made of how much."""
    output, recipe = report["output"], report["recipe"]
    per_weight = f"{output['bits_per_weight']:.3f} bits per quantized weight, " if output["quantized"] else ""
    return (
        f"{recipe['method']} {output.get('grid', recipe['grid'])} as {output['container']}, "
        f"{size(output['size_bytes'])} (was {size(report['source']['size_bytes'])}), "
        f"{per_weight}{output['bits_per_parameter']:.3f} bits per parameter"
    )


def worst_of(report: dict[str, Any]) -> str:
    rows = [row for row in report["weights"] if row.get("error")]
    worst = max(rows, key=lambda row: row["error"], default=None)
    return f"{worst['name']}, relative error of the {report['error_of']} {worst['error']:.4f}" if worst else ""


def size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"
