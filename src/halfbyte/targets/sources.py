"""What weights are read from. To add a checkpoint that is no folder of safetensors: a class, and one line here."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from halfbyte.errors import BadCheckpoint
from halfbyte.files import exists
from halfbyte.models.checkpoint import Checkpoint, download
from halfbyte.targets.gguf.source import GGUFCheckpoint

SOURCES: list[tuple[str, Callable[[Path], Checkpoint]]] = [
    (".gguf", GGUFCheckpoint),
]
"""Suffix of its files, and what opens one, or a folder of such without safetensors."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def open_checkpoint(source: str | Path) -> Checkpoint:
    """A folder of safetensors, a file or folder of another kind, or a hub id (org/name or org/name@revision).

    Raises BadCheckpoint for what is none of these.
    """
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    if exists(path):
        if found := next((opened for suffix, opened in SOURCES if _is_of(path, suffix)), None):
            return found(path)
        if path.is_dir():
            return Checkpoint(path)
        kinds = " or ".join(suffix for suffix, _ in SOURCES)
        raise BadCheckpoint(
            f"{source} is a file and no {kinds}; name the folder that holds config.json and the safetensors"
        )
    if HUB_ID.fullmatch(str(source)):
        return Checkpoint(download(str(source)))
    raise BadCheckpoint(f"there is no folder {source}, and it is no hub id (org/name)")


def _is_of(path: Path, suffix: str) -> bool:
    if path.is_file():
        return path.suffix == suffix
    return any(path.glob(f"*{suffix}")) and not any(path.glob("*.safetensors"))
