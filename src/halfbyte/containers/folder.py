"""An output folder that is whole or not there.

Everything is written to `NAME.partial`, laid out from shapes before the first byte; the finished folder is renamed into
place. A journal there lists what is done, so that a run that was killed goes on where it stopped.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.containers.safetensors import Entry, Spec, Writer
from halfbyte.errors import BadRequest

JOURNAL = "halfbyte-journal.jsonl"


class Folder:
    """Writes the tensors and files of one checkpoint."""

    def __init__(self, target: Path, specs: Mapping[str, Spec], identity: str, overwrite: bool = False, shard_bytes: float = 5e9):
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.overwrite = overwrite
        self.journal: list[dict[str, Any]] = []
        """Records of an earlier run that was cut off, in order."""
        self.shards = _shards(specs, shard_bytes)
        resumes = self._resume(identity)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self.writers = [Writer(self.partial / name, part, resume=resumes) for name, part in self.shards.items()]
        except OSError as error:
            raise self._no_room(error) from None
        self.entries: dict[str, Entry] = {name: e for writer in self.writers for name, e in writer.entries.items()}
        self._owner = {name: writer for writer in self.writers for name in writer.entries}
        if not resumes:
            self.record({"identity": identity})

    def _resume(self, identity: str) -> bool:
        path = self.partial / JOURNAL
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            records = [json.loads(line) for line in lines]
            if records and records[0].get("identity") == identity:
                self.journal = records[1:]
                path.write_text("".join(lines))  # a record that was cut off while it was written is gone
                return True
        shutil.rmtree(self.partial, ignore_errors=True)
        return False

    def write(self, name: str, tensor: Tensor) -> None:
        try:
            self._owner[name].write(name, tensor)
        except OSError as error:
            raise self._no_room(error) from None

    def record(self, record: dict[str, Any]) -> None:
        """Note a step as done. What it wrote has left this process; a later check of every byte covers the rest."""
        with open(self.partial / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def seal(self, files: Mapping[str, str], copies: Mapping[str, Path]) -> None:
        """Close the shards and add the small files, so that the partial folder reads as a checkpoint."""
        try:
            for writer in self.writers:
                writer.close()
            if len(self.shards) > 1:
                sizes = {name: spec.size_bytes for part in self.shards.values() for name, spec in part.items()}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {n: shard for shard, part in self.shards.items() for n in part}}
                (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            for name, source in copies.items():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self.partial / name)
            for name, text in files.items():
                (self.partial / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._no_room(error) from None

    def publish(self) -> None:
        """Rename into place. With `overwrite`, what was there is removed only after that."""
        (self.partial / JOURNAL).unlink()
        old = None
        if self.target.exists():
            old = self.target.with_name(self.target.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.target, old)
        os.rename(self.partial, self.target)
        if old:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _no_room(self, error: OSError) -> BadRequest | OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return error
        needed = sum(spec.size_bytes for part in self.shards.values() for spec in part.values())
        self.discard()
        return BadRequest(f"{self.target} cannot be written ({os.strerror(error.errno)}): it needs {needed / 1e9:.2f} GB; nothing was left behind")


def claim(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse a target that holds something, unless it may be replaced; never the source or a folder around it."""
    resolved = target.resolve()
    if resolved == source.resolve() or resolved in source.resolve().parents:
        raise BadRequest(f"the output {target} is or holds the source {source}; name another folder")
    if target.is_file():
        raise BadRequest(f"the output {target} is a file; name a folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise BadRequest(f"the output {target} exists and is kept; name another folder or give --overwrite")
        if not (target / "config.json").exists():
            raise BadRequest(f"the output {target} is no checkpoint (it has no config.json), so --overwrite does not replace it")


@contextmanager
def kept_on_interrupt(folder: Folder) -> Iterator[None]:
    """A request that cannot be met leaves nothing behind; an interrupted run leaves its journal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        folder.discard()
        raise


def _shards(specs: Mapping[str, Spec], limit: float) -> dict[str, dict[str, Spec]]:
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.size_bytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.size_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}
