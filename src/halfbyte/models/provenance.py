"""Where a model comes from and under which terms: what the card of its own repository says, for whatever is made of it.

Formats: the YAML at the top of a model card (huggingface_hub's docs, "Model Cards"), and general.* of a GGUF (ggml's docs/gguf.md).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.files import exists, is_within, read_object
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.gguf.source import GGUFCheckpoint

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
"""A repository's folder in the hub's cache."""
LONGEST_CARD = 1 << 16  # bytes that are looked at for the YAML on top


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

    @property
    def made_of(self) -> tuple[str, ...]:
        """Ids of what a quantized version of it was made from: itself, or what is known to be behind it."""
        return (self.repository,) if self.repository else self.base_models


def provenance_of(checkpoint: Checkpoint, asked: str) -> Provenance:
    """Of a source that was asked for by a path or a hub id."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return _of_gguf({name: value.value for name, value in checkpoint.file.metadata.items()}, checkpoint.path)
    repository = _repository(checkpoint.path, asked)
    card = checkpoint.path / "README.md"
    said = _front_matter(card) if is_within(card, checkpoint.path) else {}
    return Provenance(
        repository.partition("/")[2] if repository else checkpoint.path.resolve().name,
        repository,
        *(_text(said.get(name)) for name in ("license", "license_name", "license_link")),
        base_models=tuple(found for found in _texts(said.get("base_model")) if HUB_ID.fullmatch(found)),
        tags=_texts(said.get("tags")),
        languages=_texts(said.get("language")),
    )


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer says how a chat is written."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return "tokenizer.chat_template" in checkpoint.file.metadata
    beside = (checkpoint.path / name for name in ("chat_template.jinja", "chat_template.json"))
    return any(map(exists, beside)) or bool(read_object(checkpoint.path / "tokenizer_config.json").get("chat_template"))


def _of_gguf(said: Mapping[str, Any], path: Path) -> Provenance:
    count = said.get("general.base_model.count", 0)
    urls = [
        _text(said.get(f"general.base_model.{i}.repo_url")) or ""
        for i in range(min(count, 16) if isinstance(count, int) else 0)
    ]
    own = (_text(said.get("general.source.repo_url")) or "").removeprefix(HUB)
    return Provenance(
        _text(said.get("general.name")) or path.resolve().stem,
        own if HUB_ID.fullmatch(own) else None,
        *(_text(said.get(f"general.{name}")) for name in ("license", "license.name", "license.link")),
        base_models=tuple(found for url in urls if HUB_ID.fullmatch(found := url.removeprefix(HUB))),
        tags=_texts(said.get("general.tags")),
        languages=_texts(said.get("general.languages")),
    )


def _repository(path: Path, asked: str) -> str | None:
    """The hub's name of a folder: what was asked for where that is no path, or what the hub's cache calls it."""
    if not Path(asked).expanduser().exists() and HUB_ID.fullmatch(name := asked.partition("@")[0]):
        return name
    cached = (
        SNAPSHOT.fullmatch(path.absolute().parent.parent.name) if path.absolute().parent.name == "snapshots" else None
    )
    return f"{cached[1]}/{cached[2]}" if cached else None


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the top of a model card; nothing where there is none that can be read."""
    try:
        with open(card, "rb") as file:
            text = file.read(LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return {}
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        said = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, RecursionError, ValueError):  # a card is for people: one that is no YAML says nothing
        return {}
    return said if isinstance(said, dict) else {}


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...]:
    """One text, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for one in values if (text := _text(one)))
