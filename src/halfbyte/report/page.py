"""One page of any number of runs, for a browser: it needs no network, and says what their reports say."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from halfbyte.containers.place import beside
from halfbyte.engines.engines import ENGINES
from halfbyte.errors import BadCheckpoint, BadRequest, plural
from halfbyte.report import charts, tables, written
from halfbyte.report.card import local_paths, without_paths
from halfbyte.report.summary import beside_planned, size
from halfbyte.report.tables import Named
from halfbyte.report.types import Part, Report
from halfbyte.terminal import plain

ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
"""So that no text of JSON ends the element that it stands in."""


def page(outputs: Sequence[str | Path], plans: Sequence[Part] = ()) -> str:
    """The page of what lies in these folders, or beside these files, with what `plan` says of their models.

    Raises BadCheckpoint for one without a report of ours, BadRequest where the charts' library is not installed.
    """
    library = charts.library()
    paths = [Path(output).expanduser() for output in outputs]
    runs = named(paths)
    by_table = {
        "runs": [{"error_of": run.report.error_of, "quantized": run.report.output.quantized} for run in runs],
        "models": tables.models(runs),
        "errors": tables.errors(runs),
        "weights": tables.weights(runs),
        "spreads": tables.spreads(runs, "distribution"),
        "reads": tables.spreads(runs, "activation_distribution"),
        "outliers": tables.outliers(runs),
        "positions": tables.positions(runs),
        "needle": tables.needle(runs),
        "blame": tables.blame(runs),
    }
    specs = specifications(by_table)
    themes = {name: charts.theme(name) for name in charts.PALETTES}
    compared = [row for row in by_table["models"] if row["on"] == 0]
    first = closest(compared)["run"] if compared else 0
    return _template().render(
        first=first,
        runs=runs,
        title=titled(runs),
        verdict=verdict(runs),
        plans=[_without_paths(plan.model_dump(), paths) for plan in plans],
        conditions=list(tables.conditions(runs).values()),
        tables=by_table,
        palettes=charts.PALETTES,
        font=charts.FONT,
        data=as_script(
            plainly(
                {
                    "tables": {name: columns(rows) for name, rows in by_table.items()},
                    "specs": specs,
                    "themes": themes,
                    "palettes": charts.PALETTES,
                    "first": first,
                }
            )
        ),
        vega=library.javascript_bundle(),
    )


def specifications(by_table: dict[str, list[tables.Row]]) -> dict[str, charts.Spec]:
    """The charts of these tables."""
    gains = [row["gain"] for row in by_table["needle"]] or [0.0]
    scale = charts.powers(row["kl"] for row in (*by_table["models"], *by_table["positions"]))
    return {
        "frontier-bits": charts.frontier("bits", "bits per parameter, everything counted", scale),
        "frontier-megabytes": charts.frontier("megabytes", "size of all tensors, MB", scale),
        "errors": charts.errors(),
        "spreads": charts.spread("spreads", "weights", outliers=False),
        "reads": charts.spread("reads", "activations", outliers=True),
        "positions": charts.positions(scale),
        "needle": charts.needle((min(gains), max(gains))),
        "blame": charts.blame(),
    }


def reports(outputs: Sequence[Path]) -> list[Named]:
    """Their reports, and a name for each that no other has."""
    if not outputs:
        raise BadRequest("a report is of one run or more: halfbyte report OUT... -o report.html")
    names = [path.resolve().name for path in outputs]
    runs = []
    for path, name in zip(outputs, names, strict=True):
        report = written.read(path)
        if not isinstance(report, Report):
            raise BadCheckpoint(
                f"{beside(path, 'report.json')} is not the report of a run; halfbyte quantize writes one with each "
                "output"
            )
        runs.append(Named(str(path) if names.count(name) > 1 else name, report))
    return runs


def named(outputs: Sequence[Path]) -> list[Named]:
    """The same without this machine's paths."""
    return [
        Named(run.name, Report.model_validate(without_paths(run.report.as_dict(), local_paths(run.report, path))))
        for path, run in zip(outputs, reports(outputs), strict=True)
    ]


def _without_paths(data: dict[str, Any], outputs: Sequence[Path]) -> dict[str, Any]:
    """The same with names in place of this machine's paths, as far as the reports know them."""
    for path, run in zip(outputs, reports(outputs), strict=True):
        data = without_paths(data, local_paths(run.report, path))
    return data


def titled(runs: Sequence[Named]) -> str:
    """What the runs were made of."""
    return " and ".join(dict.fromkeys(run.report.recipe.model for run in runs))


def verdict(runs: Sequence[Named]) -> list[str]:
    """What the runs come to, in a few sentences, of what was measured under the same conditions."""
    rows = [row for row in tables.models(runs) if row["on"] == 0 and row["own"]]
    if not rows:
        return [f"What was lost has not been measured: halfbyte eval {runs[0].name} --against {titled(runs)}."]
    nearest = closest(rows)
    sentences = [_of(nearest, "comes nearest to the original" if len(rows) > 1 else "is compared with the original")]
    smallest = min(rows, key=lambda row: (row["bits"], row["kl"]))
    if smallest is not nearest:
        sentences.append(_of(smallest, "is the smallest"))
    beaten = [a["name"] for a in rows if any(b["bits"] <= a["bits"] and b["kl"] < a["kl"] for b in rows)]
    if beaten:
        sentences.append(f"Larger than another run, or as large, and further from the original: {', '.join(beaten)}.")
    return sentences


def closest(rows: Sequence[tables.Row]) -> tables.Row:
    """The model that diverges least."""
    return min(rows, key=lambda row: (row["kl"], row["bits"]))


def _of(row: dict[str, Any], does: str) -> str:
    error = "" if row["kl_error"] is None else f" ± {row['kl_error']:.4f}"
    return (
        f"{row['name']} {does}: KL {row['kl']:.4f}{error} nats per token, the same next word in "
        f"{100 * row['same_top']:.1f} % of places, at {row['bits']:.2f} bits per parameter."
    )


def columns(rows: Sequence[tables.Row]) -> dict[str, list[Any]]:
    """The same by the names of its columns, with as many digits as a chart has a use for."""
    return {
        name: [float(f"{row[name]:.7g}") if isinstance(row[name], float) else row[name] for row in rows]
        for name in (rows[0] if rows else ())
    }


def plainly(value: Any) -> Any:
    """The same with what controls a terminal or turns the direction of a text written out."""
    if isinstance(value, dict):
        return {key: plainly(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plainly(one) for one in value]
    return plain(value) if isinstance(value, str) else value


def as_script(value: Any) -> str:
    """JSON for an element of a page."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escaped in ESCAPED.items():
        text = text.replace(character, escaped)
    return text


def engine_title(name: str) -> str:
    """What an engine calls itself."""
    return ENGINES[name].title if name in ENGINES else name


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("halfbyte.report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.globals |= {"plural": plural, "counted": lambda values: Counter(values).most_common()}
    environment.globals |= {"engine_title": engine_title}
    environment.filters |= {"size": size, "engine_title": engine_title, "beside_planned": beside_planned}
    return environment.get_template("page.html.jinja")
