"""What a model was made of, as the report beside it says: what it lost is what it differs from that by, and from no
other model."""

from pathlib import Path

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.stamp import origin
from halfbyte.recipe import OTHER_COMMANDS
from halfbyte.report.types import Lineage, Origin, Report
from halfbyte.report.written import report_or_none


def source_of(checkpoint: Checkpoint) -> Lineage:
    """Of a source, for the report of what is made of it: where it is, its digest, and the models behind it.

    `made_of` is None where it is quantized and nobody says of what.
    """

    def made(of: list[Origin] | None) -> Lineage:
        return Lineage(path=str(checkpoint.path), xxh3_128=origin(checkpoint), made_of=of)

    report = report_or_none(checkpoint.path)
    source = report.source if isinstance(report, Report) else None
    if checkpoint.adapter or (not source and checkpoint.container is None):
        return made([])  # an original: nobody has lost anything of it
    if not source or source.made_of is None:
        return made(None)
    return made([Origin(path=source.path, xxh3_128=source.xxh3_128), *source.made_of])


def stranger(model: Path, reference: Checkpoint) -> str | None:
    """What a model was made of, where that is something else than this reference.

    A model without a report of ours may be of any.
    """
    report = report_or_none(model)
    if not isinstance(report, Report):
        return None
    source, recipe = report.source, report.recipe
    is_known = source.made_of is not None or recipe.method not in OTHER_COMMANDS
    if not is_known or any(_is_source(one, reference) for one in (source, *(source.made_of or []))):
        return None
    return model_name(source.path, recipe.adapter)


def _is_source(source: Origin, reference: Checkpoint) -> bool:
    """By its digest, which stays where folders move; by its path in a report that has none."""
    if source.xxh3_128:
        return source.xxh3_128 == origin(reference)
    return source.path in (str(reference.path), str(reference.path.resolve()))


def model_name(path: str | Path, adapter: str | Path | None) -> str:
    """A model as a message names it."""
    return f"{path} with the adapter {adapter}" if adapter else str(path)
