"""The card of a model on the hub (huggingface_hub's docs, "Model Cards"): its YAML."""

import re
from pathlib import Path
from typing import Any

import yaml

LONGEST_CARD = 1 << 16  # bytes that are looked at for the YAML on top


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the top of a model card; nothing where there is none that can be read."""
    try:
        with open(card, "rb") as file:
            text = file.read(LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return {}
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError, ValueError):  # a card is for people: one that is no YAML says nothing
        return {}
    return metadata if isinstance(metadata, dict) else {}
