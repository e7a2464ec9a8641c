"""The picture of a model card: where a run lost most, drawn without a browser."""

from importlib.util import find_spec
from pathlib import Path

from halfbyte.containers.place import PICTURE, beside, replace_bytes
from halfbyte.report import charts, tables
from halfbyte.report.types import Report

WIDTH, STEP = 420, 22
"""Of the smallest picture, and of a layer, in points."""
MOST_LAYERS, MOST_ROLES = 256, 64
"""Beyond these a picture says nothing, and a report that somebody has made up would take all memory."""
LONGEST = 64
"""Characters of a name."""


def add_picture(report: Report, folder: Path) -> str | None:
    """Draw the picture of a run into its folder, or beside its file, where it is not there yet; returns its name.

    None where nothing was lost, or Vega-Lite is not installed.
    """
    path = beside(folder, PICTURE)
    if not path.exists():
        drawn = picture(report)
        if drawn is None:
            return None
        replace_bytes(path, drawn)
    return path.name


def picture(report: Report) -> bytes | None:
    """As PNG."""
    rows = tables.errors([tables.Named("", report)])
    if not any(row["error"] for row in rows) or not find_spec("vl_convert"):
        return None
    layers, roles = (len({row[name] for row in rows}) for name in ("layer", "role"))
    if layers > MOST_LAYERS or roles > MOST_ROLES:
        return None
    for row in rows:
        row.update({name: _drawable(value) for name, value in row.items() if isinstance(value, str)})
    spec = charts.errors() | {
        "width": max(WIDTH, STEP * layers),
        "data": {"values": rows},
        "background": charts.PALETTES["light"]["paper"],
        "padding": 12,
    }
    return charts.library().vegalite_to_png(spec, scale=1.5, config=charts.theme("light"))


def _drawable(text: str) -> str:
    """Short, and without characters that no picture can have: the library ends the process at them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST])
