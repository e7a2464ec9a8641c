"""Two checkpoints side by side: how each tensor is stored, how far its values are apart, what was lost."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from halfbyte.arguments import Comparing, Running, documented
from halfbyte.errors import BadRequest
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.progress import Progress, shown
from halfbyte.report import written
from halfbyte.report.inspect import counted, stored
from halfbyte.report.tables import conditions_of
from halfbyte.report.types import Compared, ComparedTensor, Comparison, EvaluationRecord, Report


@documented(Comparing, Running)
def compare(a: str | Path, b: str | Path, values: bool = True, progress: Progress | bool = False) -> Comparison:
    """Two runs, or checkpoints of any kind of one model: how far those of `b` are from those of `a`.

    Args:
        {arguments}

    Raises:
        HalfbyteError: BadRequest where no tensor of the one is in the other.
    """
    one, other = Checkpoint.open(a), Checkpoint.open(b)
    kinds = [{t.name: (t.kind, t.size_bytes) for t in stored(c)} for c in (one, other)]
    errors = [_errors(checkpoint) for checkpoint in (one, other)]
    shapes = [checkpoint.tensors() for checkpoint in (one, other)]
    shared = [name for name in shapes[0] if shapes[0][name] == shapes[1].get(name)]
    if not shared:
        raise BadRequest(f"no tensor of {one.path} is in {other.path}; compare two versions of one model")
    tensors = []
    with shown(progress) as show:
        for number, name in enumerate(dict.fromkeys((*shapes[0], *shapes[1]))):
            show("comparing", number, len(shapes[0]))
            (mine, its), module = (kind.get(name, (None, 0)) for kind in kinds), name.removesuffix(".weight")
            comparable = values and shapes[0].get(name) == shapes[1].get(name)
            tensors.append(
                ComparedTensor(
                    name=name,
                    stored_as=(mine[0], its[0]),
                    size_bytes=(mine[1], its[1]),
                    error=(errors[0].get(module), errors[1].get(module)),
                    difference=difference(one, other, name) if comparable else None,
                )
            )
    reports = [written.report_or_none(checkpoint.path) for checkpoint in (one, other)]
    evaluations = [report.evaluations if report else [] for report in reports]
    pairs = [(mine, its) for mine in evaluations[0] for its in evaluations[1] if _alike(mine, its)]
    return Comparison(
        a=_compared(one),
        b=_compared(other),
        tensors=tensors,
        evaluations=pairs,
        recipes=_recipes(*reports),
        warnings=[
            f"scales were moved between weights of {checkpoint.path} (awq, smoothquant): its values are apart where "
            "what it computes is not"
            for checkpoint, report in zip((one, other), reports, strict=True)
            if values and isinstance(report, Report) and report.folds
        ],
    )


def difference(one: Checkpoint, other: Checkpoint, name: str) -> float:
    """How far a tensor of the other is from that of the one, relative to this; 0 for the same numbers."""
    if one.same(name, other):
        return 0.0
    x, y = one.read(name).double(), other.read(name).double()
    distance, length = (x - y).norm().item(), x.norm().item()
    return distance / length if length else float(distance > 0)


def _errors(checkpoint: Checkpoint) -> dict[str, float]:
    report = written.report_or_none(checkpoint.path)
    return {row.name: row.error for row in report.weights} if isinstance(report, Report) else {}


def _compared(checkpoint: Checkpoint) -> Compared:
    size = counted(stored(checkpoint))
    return Compared(
        path=str(checkpoint.path),
        container=checkpoint.container,
        size_bytes=size.size_bytes,
        bits_per_parameter=size.bits_per_parameter,
    )


def _alike(mine: EvaluationRecord, its: EvaluationRecord) -> bool:
    return conditions_of(mine) == conditions_of(its) and mine.model.kv == its.model.kv


def _recipes(*reports: Any) -> dict[str, tuple[Any, Any]]:
    """The words of two recipes that differ."""
    if not all(isinstance(report, Report) for report in reports):
        return {}
    fields: dict[str, list[Any]] = defaultdict(lambda: [None, None])
    for number, report in enumerate(reports):
        for name, value in report.as_dict()["recipe"].items():
            fields[name][number] = value
    return {name: (mine, its) for name, (mine, its) in fields.items() if mine != its}
