"""Charts of reports, as Vega-Lite specifications: what is drawn, by the names of fields in tables of plain rows.

The page draws them in a browser, the model card's picture is drawn without one; tables come from `tables.py`.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from halfbyte.errors import BadRequest

Spec = dict[str, Any]

PALETTES: dict[str, dict[str, Any]] = {
    "light": {
        "paper": "#ffffff",
        "wash": "#f5f6f8",
        "ink": "#1c2127",
        "soft": "#5d6772",
        "line": "#dfe3e8",
        "accent": "#1f5fbf",
        "warn": "#b3261e",
        "ramp": ["#f4f1ea", "#f3c99a", "#e58a4e", "#b83c2b", "#5e1020"],
        "kinds": ["#1f5fbf", "#d2691e", "#13807c", "#8250c4", "#6b7480", "#b8336a"],
    },
    "dark": {
        "paper": "#14171b",
        "wash": "#1d2126",
        "ink": "#e8eaed",
        "soft": "#9aa4af",
        "line": "#31373f",
        "accent": "#7fb0ff",
        "warn": "#ff8a7a",
        "ramp": ["#23262b", "#5a3424", "#ad5328", "#ef9a4f", "#ffe9bd"],
        "kinds": ["#7fb0ff", "#f0a35e", "#4fc7bf", "#bb9bf2", "#a3adb8", "#f08bb4"],
    },
}
"""Colours by what they are for: errors go from pale to strong along `ramp`, methods are told apart by `kinds`."""
FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CHOSEN = {"name": "chosen", "value": -1}
"""The run that is looked at."""


def library() -> Any:
    """vl-convert: Vega and Vega-Lite, in a browser and without one. Raises BadRequest where it is not installed."""
    if not find_spec("vl_convert"):
        raise BadRequest(
            "charts need Vega-Lite, which halfbyte does not bring by itself: pip install 'halfbyte[report]'"
        )
    import vl_convert

    return vl_convert


def theme(name: str) -> Spec:
    """Vega-Lite's configuration for a palette."""
    colour = PALETTES[name]
    text_style = {"labelColor": colour["soft"], "titleColor": colour["soft"], "labelFontSize": 12, "titleFontSize": 12}
    quiet = {"domain": False, "ticks": False, "titleFontWeight": "normal", "labelPadding": 6, "titlePadding": 10}
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**text_style, **quiet, "gridColor": colour["line"]},
        "axisX": {"grid": False, "tickCount": 8},
        "legend": {
            **text_style,
            "titleFontWeight": "normal",
            "orient": "top",
            "symbolSize": 90,
            "offset": 4,
            "symbolBaseFillColor": colour["soft"],
        },
        "header": {**text_style, "labelFontWeight": "normal"},
        "range": {"category": colour["kinds"], "heatmap": colour["ramp"], "ramp": colour["ramp"]},
        "text": {"color": colour["ink"], "fontSize": 12},
        "rule": {"color": colour["soft"]},
        "line": {"color": colour["accent"]},
        "area": {"color": colour["accent"]},
        "bar": {"color": colour["accent"]},
    }


def field(name: str, title: str = "", form: str = "", **more: Any) -> Spec:
    """A number by the name of its field."""
    return {"field": name, "type": "quantitative", "title": title or name, **({"format": form} if form else {}), **more}


def label(name: str, title: str | None = "", **more: Any) -> Spec:
    """A name, in the order of the table."""
    return {"field": name, "type": "nominal", "title": name if title == "" else title, "sort": None, **more}


def _chart(data: str, first: Spec, *others: Spec, **more: Any) -> Spec:
    """Layers over one table, as wide as there is room."""
    body = {"layer": [first, *others]} if others else first
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": data},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        **body,
        **more,
    }


RUN = [label("name", "run"), label("method"), label("grid"), label("container")]
KL = "KL divergence, nats per token"
MAJOR = "indexof(['1.00', '2.00', '5.00'], substring(format(datum.value, '.2e'), 0, 4)) >= 0"
POWERS = {"format": "~g", "gridOpacity": {"condition": {"test": MAJOR, "value": 1}, "value": 0}}
"""An axis of a scale of powers, with lines at 1, 2 and 5 of each."""
GIVEN = "KL given back, nats per token"


def powers(values: Iterable[float]) -> Spec:
    """The scale of divergences: of powers, but where one is 0."""
    has_zero = min(values, default=1.0) <= 0
    kind: Spec = {"type": "symlog", "constant": 1e-4} if has_zero else {"type": "log"}
    return {**kind, "nice": False, "padding": 16}


def frontier(x: str, title: str, scale: Spec) -> Spec:
    """Size against divergence: each model with its error, and a line through those that none is both smaller and
    nearer than."""
    by = {"x": field(x, title, scale={"zero": False, "nice": True, "padding": 24})}
    seen = [
        *RUN,
        label("kv", "KV cache"),
        field("bits", "bits per parameter", ".3f"),
        field("megabytes", "MB", ",.2f"),
        field("kl", "KL, nats per token", ".5f"),
        field("kl_error", "± standard error", ".5f"),
        field("perplexity", "perplexity", ".3f"),
        field("same_top", "same next word", ".2%"),
    ]
    best = {
        "transform": [
            {
                "sort": [{"field": x}, {"field": "kl"}],
                "window": [{"op": "min", "field": "kl", "as": "least"}],
                "frame": [None, 0],
            },
            {"filter": "datum.kl <= datum.least"},
        ],
    }
    is_chosen = "datum.run === chosen"
    line = {"type": "line", "strokeWidth": 1.5, "opacity": 0.45}
    bars = {
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {**by, "y": field("low", KL), "y2": {"field": "high"}},
    }
    points = {
        "name": "points",  # beside which the page puts their names
        "mark": {"type": "point", "filled": True, "cursor": "pointer", "opacity": 1},
        "encoding": {
            **by,
            "y": field("kl", KL, scale=scale, axis=POWERS),
            "color": label("method", None),
            "shape": label("container", None),
            "size": {"condition": {"test": is_chosen, "value": 260}, "value": 110},
            "tooltip": seen,
        },
    }
    front = {"name": "front", **best, "mark": line, "encoding": {**by, "y": field("kl", KL)}}
    return _chart("models", front, bars, points, params=[CHOSEN], height=360)


def errors() -> Spec:
    """Relative errors of weights by layer and role."""
    seen = [
        label("tensor", "weight"),
        label("grid"),
        field("bits", "bits per weight", ".3f"),
        field("error", "relative error", ".4f"),
        field("worst", "of its worst row", ".4f"),
        field("tokens", "calibration tokens", ","),
        field("count", "weights here, this the worst", ","),
    ]
    return _chart(
        "errors",
        {
            "mark": {"type": "rect", "cursor": "pointer"},
            "encoding": {
                "x": label("layer", "layer", axis={"labelAngle": 0, "labelOverlap": "parity"}),
                "y": label("role", None),
                "color": field("error", "relative error", legend={"gradientLength": 160, "format": ".2g"}),
                "tooltip": seen,
            },
        },
        height={"step": 24},
        config={"scale": {"bandPaddingInner": 0.06}},
    )


PERCENTILES = {
    "low": "least",
    "p0_1": "0.1 %",
    "p1": "1 %",
    "p25": "25 %",
    "median": "median",
    "p75": "75 %",
    "p99": "99 %",
    "p99_9": "99.9 %",
    "high": "most",
}
LAYERS = {
    "field": "at",
    "type": "quantitative",
    "title": "layer",
    "scale": {"nice": False},
    "axis": {"tickMinStep": 1, "format": "d"},
}


def spread(data: str, title: str, outliers: bool) -> Spec:
    """How the values of a role are spread in each layer: half of them, 98 and 99.8 in a hundred, and extremes."""
    scale: Spec = {"type": "symlog", "constant": 1} if outliers else {"type": "sqrt"}
    seen = [label("tensor", "weight"), *(field(name, caption, ".4~g") for name, caption in PERCENTILES.items())]

    def layer(mark: Spec, y: str, y2: str = "", **more: Any) -> Spec:
        ends = {"y": field(y, title, scale=scale)} | ({"y2": {"field": y2}} if y2 else {})
        return {"mark": mark, "encoding": {"x": LAYERS, **ends, **more}}

    edge = {"type": "line", "strokeWidth": 1, "strokeDash": [2, 3], "opacity": 0.8}
    layers = [
        layer({"type": "area", "opacity": 0.18}, "p0_1", "p99_9"),
        layer({"type": "area", "opacity": 0.28}, "p1", "p99"),
        layer({"type": "area", "opacity": 0.5}, "p25", "p75"),
        layer(edge, "low"),
        layer(edge, "high"),
        layer({"type": "rule", "opacity": 0, "strokeWidth": 10}, "low", "high", tooltip=seen),
    ]
    if outliers:
        dot = {"type": "point", "filled": True, "size": 42, "opacity": 0.9, "color": {"expr": "warn"}}
        outlier_tooltip = [
            label("tensor", "read by"),
            field("channel", "outlier channel", "d"),
            field("largest", "its largest size", ".4~g"),
            field("median_channel", "of the median channel", ".4~g"),
        ]
        layers.append({"data": {"name": "outliers"}, **layer(dot, "largest", tooltip=outlier_tooltip)})
    return _chart(data, *layers, params=[{"name": "warn", "value": PALETTES["light"]["warn"]}], height=240)


def positions(scale: Spec) -> Spec:
    """Divergence along the window: the run that is looked at before the others."""
    x = {"x": field("at", "position in the window, tokens", "d", scale={"nice": False})}
    seen = [
        label("name", "run"),
        field("first", "from token", "d"),
        field("last", "to token", "d"),
        field("kl", "KL, nats per token", ".5f"),
        field("kl_error", "± standard error", ".5f"),
    ]
    is_chosen = {"test": "datum.run === chosen", "value": 1}
    kl = field("kl", KL, scale=scale, axis=POWERS)
    band = {
        "mark": {"type": "area"},
        "encoding": {
            **x,
            "y": field("low", KL),
            "y2": {"field": "high"},
            "detail": label("run"),
            "opacity": {"condition": {**is_chosen, "value": 0.18}, "value": 0},
        },
    }
    line = {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {**x, "y": kl, "detail": label("run"), "opacity": {"condition": is_chosen, "value": 0.22}},
    }
    dots = {
        "mark": {"type": "point", "filled": True, "size": 34},
        "encoding": {**x, "y": kl, "opacity": {"condition": is_chosen, "value": 0.15}, "tooltip": seen},
    }
    return _chart("positions", band, line, dots, params=[CHOSEN], height=260)


def needle(domain: Sequence[float]) -> Spec:
    """What having read a fact adds to its answer, by place and length; several of them have one `domain` of colours."""
    seen = [
        label("of", "model"),
        field("length", "tokens", "d"),
        field("depth", "depth", ".0%"),
        field("gain", "gain, nats per token", ".3f"),
        field("found", "answers found", ".0%"),
    ]
    at = {
        "x": {
            "field": "depth",
            "type": "ordinal",
            "title": "depth of the fact",
            "axis": {"format": ".0%", "labelAngle": 0},
        },
        "y": {"field": "length", "type": "ordinal", "title": "tokens"},
    }
    cells = {
        "mark": {"type": "rect", "opacity": 0.6},
        "encoding": {
            "color": field(
                "gain",
                "gain, nats per token",
                legend={"gradientLength": 160},
                scale={"domain": list(domain), "range": [{"expr": "wash"}, {"expr": "accent"}]},
            ),
            "tooltip": seen,
        },
    }
    labels = {
        "mark": {"type": "text", "fontSize": 11, "color": {"expr": "ink"}},
        "encoding": {"text": field("gain", "", ".2f")},
    }
    return _chart(
        "needle",
        cells,
        labels,
        encoding=at,
        height={"step": 30},
        params=[{"name": name, "value": PALETTES["light"][name]} for name in ("ink", "wash", "accent")],
    )


def blame() -> Spec:
    """What each part gives back in divergence when it is put back as it was."""
    seen = [
        label("part"),
        label("kind"),
        field("kl", "KL given back", ".5f"),
        field("kl_error", "± standard error", ".5f"),
        field("error", "largest relative error", ".4f"),
    ]
    y = {"y": label("part", None, axis={"labelLimit": 220})}
    bars = {
        "mark": {"type": "bar", "cornerRadius": 2, "opacity": 0.6},
        "encoding": {**y, "x": field("kl", GIVEN), "tooltip": seen},
    }
    rules = {"mark": "rule", "encoding": {**y, "x": field("low", GIVEN), "x2": {"field": "high"}}}
    return _chart("blame", bars, rules, height={"step": 22})
