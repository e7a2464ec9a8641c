"""Reports as tables of plain rows, one table for each chart: what is in the JSON, and nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.models.roles import block_of
from halfbyte.report.types import Conditions, Divergence, EvaluationRecord, Report, WeightReport

Row = dict[str, Any]
OUTSIDE = "none"
"""Where the layer of a weight would stand that is in none."""
LEAST = 1e-9
"""Where error bars end that would reach zero, on a scale of powers."""
MOST_DIGITS = 4
"""Of the number of a layer; what has more is a name that somebody has made up."""
MAX_ROWS = 2000
"""Weights that the page lists of a run, those that lost most."""


@dataclass(frozen=True)
class Named:
    """A run, and what a page calls it."""

    name: str
    report: Report


def conditions_of(one: Conditions) -> tuple[str, ...]:
    """Measurements under the same of these can be compared."""
    reference = one.reference_xxh3_128 or one.reference_path
    return (reference, one.tokens_sha256, one.convention, str(one.length), str(one.windows))


def measured(run: Named) -> list[EvaluationRecord]:
    """What was measured against the source, and not against another model."""
    by_conditions = {
        conditions_of(e): e for e in (*run.report.evaluations, run.report.evaluation) if e and not e.foreign
    }
    return list(by_conditions.values())


def conditions(runs: Sequence[Named]) -> dict[tuple[str, ...], str]:
    """Under which something was measured, those of most runs first, and in words."""
    by_conditions: dict[tuple[str, ...], list[EvaluationRecord]] = {}
    for run in runs:
        for one in measured(run):
            by_conditions.setdefault(conditions_of(one), []).append(one)
    often = sorted(by_conditions.items(), key=lambda item: (-len(item[1]), -item[1][0].model.tokens))
    return {key: in_words(records[0]) for key, records in often}


def in_words(one: EvaluationRecord) -> str:
    """What an evaluation was measured on."""
    return (
        f"{one.model.tokens:,} tokens of {one.text}, windows of {one.length}, convention {one.convention}, against "
        f"{one.reference_path}"
    )


def models(runs: Sequence[Named]) -> list[Row]:
    """A row for each model that was measured, under each of the conditions."""
    all_conditions = list(conditions(runs))
    return [
        _model(number, run, all_conditions.index(conditions_of(one)), divergence, divergence is one.model)
        for number, run in enumerate(runs)
        for one in measured(run)
        for divergence in (one.model, *one.other_caches)
    ]


def _model(number: int, run: Named, on: int, divergence: Divergence, is_own: bool) -> Row:
    report = run.report
    return {
        "run": number,
        "on": on,
        "own": is_own,
        "name": run.name,
        "label": run.name if is_own else f"{run.name}, KV cache {divergence.kv or 'in 16 bits'}",
        "method": report.recipe.method,
        "grid": report.output.grid or report.recipe.grid,
        "container": report.output.container,
        "kv": divergence.kv or "16 bits",
        "bits": report.output.bits_per_parameter,
        "megabytes": report.output.size_bytes / 1e6,
        "kl": divergence.kl,
        "kl_error": divergence.kl_error,
        **ends(divergence.kl, divergence.kl_error),
        "perplexity": divergence.perplexity,
        "same_top": divergence.same_top,
    }


def ends(value: float, error: float | None) -> Row:
    """Of its error bar."""
    return {"low": max(value - (error or 0.0), min(value, LEAST)), "high": value + (error or 0.0)}


def positions(runs: Sequence[Named]) -> list[Row]:
    """Divergence by position in the window."""
    all_conditions = list(conditions(runs))
    return [
        {
            "run": number,
            "on": all_conditions.index(conditions_of(one)),
            "name": run.name,
            "at": (part.first + part.last) / 2,
            "first": part.first,
            "last": part.last,
            "kl": part.kl,
            "kl_error": part.kl_error,
            **ends(part.kl, part.kl_error),
        }
        for number, run in enumerate(runs)
        for one in measured(run)
        for part in one.model.kl_by_position
    ]


def weights(runs: Sequence[Named]) -> list[Row]:
    """Those of each run that lost most."""
    return [
        {
            "run": number,
            "tensor": row.name,
            "grid": row.grid,
            "bits": row.bits_per_weight,
            "error": row.error,
            "worst": row.worst_row,
            "tokens": row.tokens,
            "activations": row.activations.error if row.activations else None,
            "note": row.note,
        }
        for number, run in enumerate(runs)
        for row in sorted(run.report.weights, key=lambda row: -row.error)[:MAX_ROWS]
    ]


def errors(runs: Sequence[Named]) -> list[Row]:
    """Of each layer and role, the weight that lost most."""
    return [
        {
            "run": number,
            "layer": layer,
            "role": role,
            "count": count,
            "tensor": worst.name,
            "grid": worst.grid,
            "bits": worst.bits_per_weight,
            "error": worst.error,
            "worst": worst.worst_row,
            "tokens": worst.tokens,
        }
        for number, layer, role, count, worst in _worst_of_cells(runs)
    ]


def spreads(runs: Sequence[Named], of: str) -> list[Row]:
    """`distribution` or `activation_distribution` of the same weights, but for those outside of layers."""
    return [
        {
            "run": number,
            "role": role,
            "at": int(layer),
            "tensor": worst.name,
            **{name: value for name, value in distribution.as_dict().items() if name != "outliers"},
        }
        for number, layer, role, count, worst in _worst_of_cells(runs)
        if (distribution := worst[of]) and layer != OUTSIDE
    ]


def outliers(runs: Sequence[Named]) -> list[Row]:
    """Channels of activations that are many times the median one."""
    return [
        {
            "run": number,
            "role": role,
            "at": int(layer),
            "tensor": worst.name,
            "channel": one.channel,
            "largest": one.largest,
            "median_channel": distribution.median_channel,
        }
        for number, layer, role, count, worst in _worst_of_cells(runs)
        if (distribution := worst.activation_distribution) and layer != OUTSIDE
        for one in distribution.outliers
    ]


def _worst_of_cells(runs: Sequence[Named]) -> Iterator[tuple[int, str, str, int, WeightReport]]:
    """Of each run, layer and role: how many weights there are, and the one that lost most."""
    for number, run in enumerate(runs):
        for (layer, role), rows in cells(run.report).items():
            yield number, layer, role, len(rows), max(rows, key=lambda row: row.error)


def cells(report: Report) -> dict[tuple[str, str], list[WeightReport]]:
    """Weights by layer and role; experts of a kind are one role. Layers come in their order, roles in the report's."""
    by_cell: dict[tuple[str, str], list[WeightReport]] = {}
    for row in report.weights:
        by_cell.setdefault(layer_and_role(row.name), []).append(row)
    roles = shortened(dict.fromkeys(role for _, role in by_cell))
    order = sorted(by_cell, key=lambda key: -1 if key[0] == OUTSIDE else int(key[0]))
    by_role = {role: n for n, role in enumerate(roles)}
    order.sort(key=lambda key: by_role[key[1]])
    return {(layer, roles[role]): by_cell[layer, role] for layer, role in order}


def layer_and_role(name: str) -> tuple[str, str]:
    """The layer and the role of a weight: `model.layers.3.mlp.experts.7.down_proj` is of layer 3, and a
    `mlp.experts.*.down_proj`."""
    block = block_of(f"{name}.weight", encoders=True)
    layer = block.rpartition(".")[2] if block else ""
    if not layer or len(layer) > MOST_DIGITS:
        return OUTSIDE, name
    rest = name.removeprefix(f"{block}.").split(".")
    return layer, ".".join("*" if part.isdigit() else part for part in rest)


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Names by their last parts, where these tell them apart."""
    names = list(names)
    lasts = [name.rpartition(".")[2] for name in names]
    return {name: last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)}


def needle(runs: Sequence[Named]) -> list[Row]:
    """Facts read back, by the original and by the model."""
    return [
        {"run": number, "of": of, **row.as_dict()}
        for number, run in enumerate(runs)
        if (recalled := run.report.needle)
        for of, rows in (("the original", recalled.reference), ("this model", recalled.model.rows))
        for row in rows
    ]


def blame(runs: Sequence[Named]) -> list[Row]:
    """What parts give back in divergence when they are put back, most first."""
    return [
        {
            "run": number,
            "part": part.name,
            "kind": part.kind,
            "kl": kl,
            "kl_error": error,
            "low": kl - (error or 0.0),
            "high": kl + (error or 0.0),
            "error": part.error,
        }
        for number, run in enumerate(runs)
        for part in (run.report.blame.parts if run.report.blame else ())
        for kl, error in [part.kl]
    ]
