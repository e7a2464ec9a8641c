"""Where a model comes from and under which terms: what the card of its own repository says, for whatever is made of it.

Format: the YAML at the top of a model card (huggingface_hub's docs, "Model Cards"), or what the file of the weights
says in its place.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.models.checkpoint import Checkpoint

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
"""A repository's folder in the hub's cache."""


@dataclass(frozen=True)
class Provenance:
    """What is known of a source; nothing is guessed, and nothing of it is a path."""

    name: str
    repository: str | None = None
    """Its id on the hub, org/name."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: tuple[str, ...] = ()
    """Ids of what it was made from, as its card says."""
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    """What it is for, in the hub's words."""

    @property
    def made_of(self) -> tuple[str, ...]:
        """Ids of what a quantized version of it was made from: itself, or what is known to be behind it."""
        return (self.repository,) if self.repository else self.base_models


def provenance_of(checkpoint: Checkpoint, asked: str) -> Provenance:
    """Of a source that was asked for by a path or a hub id."""
    repository = _repository(checkpoint.path, asked)
    named = repository.partition("/")[2] if repository else checkpoint.path.resolve().name
    name, repository = checkpoint.known_as or (named, repository)
    card = checkpoint.card
    return Provenance(
        name,
        repository,
        *(text_of(card.get(name)) for name in ("license", "license_name", "license_link")),
        base_models=tuple(base_model for base_model in _texts(card.get("base_model")) if HUB_ID.fullmatch(base_model)),
        tags=_texts(card.get("tags")),
        languages=_texts(card.get("language")),
        pipeline_tag=text_of(card.get("pipeline_tag")),
    )


def _repository(path: Path, asked: str) -> str | None:
    """The hub's name of a folder: what was asked for where that is no path, or what the hub's cache calls it."""
    if not Path(asked).expanduser().exists() and HUB_ID.fullmatch(name := asked.partition("@")[0]):
        return name
    cached = (
        SNAPSHOT.fullmatch(path.absolute().parent.parent.name) if path.absolute().parent.name == "snapshots" else None
    )
    return f"{cached[1]}/{cached[2]}" if cached else None


def text_of(value: object) -> str | None:
    """A text without space around it; None for an empty one, and for what is no text."""
    return value.strip() or None if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...]:
    """One text, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for one in values if (text := text_of(one)))
