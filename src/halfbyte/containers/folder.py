"""An output folder that is whole or not there.

Everything is written to `NAME.partial`, laid out from shapes before the first byte; the finished folder is renamed into
place. A journal there lists what is done, so that a run that was killed goes on where it stopped.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from halfbyte.containers.safetensors import Entry, Output
from halfbyte.errors import BadRequest, HalfbyteError

JOURNAL = "halfbyte-journal.jsonl"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BESIDE = ("report.json", "README.md", "recipe.yaml", "Modelfile")
"""What is written next to an output that is one file, under that file's name."""
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST}


class Shard(NamedTuple):
    """A file of tensors that is to be."""

    size_bytes: int
    """Of its tensors; the file is larger by its header."""
    lay_out: Callable[[Path, bool], Output]
    """Makes it at a path, or, if the flag is set, goes on with what lies there."""


class Folder:
    """Writes the tensors and files of one checkpoint."""

    def __init__(self, target: Path, shards: Mapping[str, Shard], identity: str):
        """`shards` by their file names."""
        self.target = target
        self.partial, self._old = _beside(target)
        self.journal: list[dict[str, Any]] = []
        """Records of an earlier run that was cut off, in order."""
        self.shards = shards
        self.writers: list[Output] = []
        try:
            self._lock()
            resumes = self._resume(identity)
            self.writers = [shard.lay_out(self.partial / name, resumes) for name, shard in shards.items()]
            if not resumes:
                self.record({"identity": identity})
        except OSError as error:
            raise self.refusal(error) from error
        self.entries: dict[str, Entry] = {name: e for writer in self.writers for name, e in writer.entries.items()}
        self._owner = {name: writer for writer in self.writers for name in writer.entries}

    def _lock(self) -> None:
        """Two runs that write the same folder would each spoil what the other has done."""
        self.partial.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial / JOURNAL, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BadRequest(f"another run is writing {self.target}; wait for it, or name another folder") from None
        except OSError:
            pass  # a file system without locks

    def _resume(self, identity: str) -> bool:
        self._file.seek(0)
        try:
            lines = [line for line in self._file.readlines() if line.endswith("\n")]  # not a record that was cut off while it was written
            first, *records = [json.loads(line) for line in lines]
        except ValueError:
            lines, first, records = [], {}, []
        resumes = first.get("identity") == identity and all(self._is_laid_out(name) for name in self.shards)
        if resumes:
            self.journal = records
            self._file.truncate(len("".join(lines).encode()))
        else:
            self._file.truncate(0)
            for path in self.partial.iterdir():
                if path.name != JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return resumes

    def _is_laid_out(self, name: str) -> bool:
        path = self.partial / name
        return path.exists() and path.stat().st_size > self.shards[name].size_bytes

    def write(self, name: str, tensor: Tensor, at: int | None = None) -> None:
        """The whole tensor, or rows of its leading dimension from `at` on."""
        self._owner[name].write(name, tensor, at)

    def companion(self, name: str) -> Path:
        """Where a small file of the output is written: next to an output that is one file, it is to bear that file's name."""
        place = self.target.resolve()
        return self.partial / (beside(place, name).name if is_file(place) else name)

    def record(self, record: dict[str, Any]) -> None:
        """Note a step as done. What it wrote has left this process; a later check of every byte covers the rest."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def seal(self) -> None:
        """Every byte of the tensors is on the disk."""
        for writer in self.writers:
            writer.close()

    def publish(self) -> None:
        """Rename into place. What was there is removed only after that; `claim` mends a run that was killed in between."""
        place = self.target.resolve()
        if is_file(place):
            for name in BESIDE:
                os.replace(self.companion(name), beside(place, name))
            os.replace(self.partial / place.name, place)
            shutil.rmtree(self.partial)
            return
        if place.exists():
            os.rename(place, self._old)
        os.rename(self.partial, place)
        (place / JOURNAL).unlink()
        shutil.rmtree(self._old, ignore_errors=True)

    def close(self) -> None:
        """Let go of the files; what is done stays."""
        for writer in self.writers:
            writer.abandon()
        self._file.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):  # a full disk may fail the last words to the journal
            self.close()

    def refusal(self, error: OSError) -> HalfbyteError | OSError:
        """What to raise when writing failed: of a disk that is full or not ours, the partial folder is removed."""
        if error.errno in FULL:
            reason = f"{os.strerror(error.errno)}: it needs {sum(shard.size_bytes for shard in self.shards.values()) / 1e9:.2f} GB"
        elif error.errno in REFUSED and Path(error.filename or self.partial).is_relative_to(self.partial):
            reason = os.strerror(error.errno)
        else:
            return error
        if hasattr(self, "_file"):
            self.discard()
        return BadRequest(f"{self.target} cannot be written ({reason}); nothing was left behind")


def claim(target: Path, source: Path, overwrite: bool, files: Collection[Path] = ()) -> None:
    """Refuse a target that holds something, unless it may be replaced; never the source, one of its `files`, or a folder around it or in it."""
    place, source_place = target.resolve(), source.resolve()
    if place == source_place or place in source_place.parents or place in {path.resolve() for path in files}:
        raise BadRequest(f"the output {target} is or holds the source {source}; name another {'file' if is_file(target) else 'folder'}")
    if source_place in place.parents:
        raise BadRequest(f"the output {target} lies in the source {source}, whose files are copied; name another folder")
    partial, old = _beside(target)
    if old.exists() and not place.exists():
        os.rename(old, place)  # killed between two renames: the new folder is in `partial`, and is finished below
    _claim_file(target, place, overwrite) if is_file(place) else _claim_folder(target, place, overwrite)
    if partial.exists() and not (partial / JOURNAL).exists() and not (partial.is_dir() and not any(partial.iterdir())):
        raise BadRequest(f"{partial} is in the way and not of halfbyte's making; move it, or name another folder")


def _claim_file(target: Path, place: Path, overwrite: bool) -> None:
    if place.is_dir():
        raise BadRequest(f"the output {target} is a folder; name a file, or a folder without .gguf")
    partial, _ = _beside(target)
    if place.exists() and (partial / JOURNAL).exists() and not (partial / place.name).exists():
        shutil.rmtree(partial, ignore_errors=True)  # killed when the file was in place and nothing but this was left to do
    if place.exists() and not overwrite:
        raise BadRequest(f"the output {target} exists and is kept; name another file or give --overwrite")
    taken = next((path for name in BESIDE if (path := beside(place, name)).exists()), None)
    if taken and not overwrite and not place.exists() and not (partial / JOURNAL).exists():
        raise BadRequest(f"{taken} is in the way of what is written beside {target}; name another file, move it, or give --overwrite")


def _claim_folder(target: Path, place: Path, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise BadRequest(f"the output {target} is a file; name a folder")
    if place.exists() and any(place.iterdir()):
        if not overwrite:
            raise BadRequest(f"the output {target} exists and is kept; name another folder or give --overwrite")
        if not (place / "config.json").exists() and not any(place.glob("*.gguf")):
            raise BadRequest(f"the output {target} is no checkpoint (it has no config.json and no .gguf), so --overwrite does not replace it")


def is_file(target: Path) -> bool:
    """Whether an output is one file, with its report beside it, and no folder."""
    return target.suffix == ".gguf"


def beside(checkpoint: Path, name: str) -> Path:
    """A file that belongs to a checkpoint: in its folder, or next to a GGUF under the GGUF's name."""
    return checkpoint.with_name(f"{checkpoint.stem}.{name}") if is_file(checkpoint) else checkpoint / name


@contextmanager
def kept_on_interrupt(folder: Folder) -> Iterator[None]:
    """A request that cannot be met leaves nothing behind; whatever else ends a run leaves its journal, and the same call goes on."""
    try:
        yield
    except HalfbyteError:
        folder.discard()
        raise
    except OSError as error:
        raise folder.refusal(error) from error
    finally:
        with suppress(OSError):
            folder.close()


def _beside(target: Path) -> tuple[Path, Path]:
    """Where the new folder grows, and where the old one waits until it is replaced. Links are followed: rename would replace them."""
    place = target.resolve()
    return place.with_name(f"{place.name}.partial"), place.with_name(f"{place.name}.halfbyte-old")
