"""What a model was made of, as the report beside it says: what it lost is what it differs from that by, and from no other model."""

from pathlib import Path
from typing import Any

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.stamp import origin
from halfbyte.recipe import OTHER_COMMANDS
from halfbyte.report.written import read


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a source, for the report of what is made of it: where it is, its digest, and the models behind it, nearest first.

    `made_of` is None where it is quantized and nobody says of what.
    """
    known = {"path": str(checkpoint.path), "xxh3_128": origin(checkpoint)}
    said = read(checkpoint.path).get("source")
    if checkpoint.adapter or (not said and checkpoint.container is None):
        return {**known, "made_of": []}  # an original: nobody has lost anything of it
    if not said or said.get("made_of") is None:
        return {**known, "made_of": None}
    return {**known, "made_of": [{"path": said["path"], "xxh3_128": said.get("xxh3_128")}, *said["made_of"]]}


def stranger(model: Path, reference: Checkpoint) -> str | None:
    """What a model was made of, where that is something else than this reference. A model without a report of ours may be of any."""
    report = read(model)
    said, asked = report.get("source"), report.get("recipe") or {}
    if not said:
        return None
    behind = said.get("made_of")
    is_known = behind is not None or asked.get("method") not in OTHER_COMMANDS
    if not is_known or any(is_source(one, reference) for one in (said, *(behind or []))):
        return None
    return told(said["path"], asked.get("adapter"))


def is_source(said: dict[str, Any], reference: Checkpoint) -> bool:
    """By its digest, which stays where folders move; by its path in a report that has none."""
    digest = said.get("xxh3_128")
    return (
        digest == origin(reference) if digest else said["path"] in (str(reference.path), str(reference.path.resolve()))
    )


def told(path: str | Path, adapter: str | Path | None) -> str:
    return f"{path} with the adapter {adapter}" if adapter else str(path)
