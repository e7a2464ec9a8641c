"""The tensors and files of an output while they are written.

Everything is written to a partial folder, laid out from shapes before the first byte; the finished folder is moved into
place. A journal lists what is done, so that a run that was killed goes on where it stopped.
"""

import errno
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from halfbyte.containers.place import OutputPath, not_through_links, remove
from halfbyte.containers.safetensors import Entry, FileWriter
from halfbyte.errors import BadRequest, HalfbyteError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.ELOOP,
}
SCRATCH = ".scratch-"
WHOLE = {"whole": True}
"""The last record: all is written and verified, and only moved into place from here on."""


class Shard(NamedTuple):
    """A file of tensors that is to be."""

    size_bytes: int
    """Of its tensors; the file is larger by its header."""
    lay_out: Callable[[Path, bool], FileWriter]
    """Makes it at a path, or, if the flag is set, goes on with what lies there."""
    file_bytes: Callable[[], int]
    """How large the file will be, header and padding counted."""


class OutputFolder:
    """Writes the tensors and files of one checkpoint."""

    def __init__(self, place: OutputPath, shards: Mapping[str, Shard], identity: str, overwrite: bool = False):
        """`shards` by their file names. Raises BadRequest for a target that is in the way, or is being written."""
        self.target = place.target
        self.place = place
        self.partial = self.place.partial
        self.journal: list[dict[str, Any]] = []
        """Records of an earlier run that was cut off, in order."""
        self.shards = shards
        self.writers: list[FileWriter] = []
        self.is_published = False
        """Whether an earlier run of the same command had nothing left to do but to move things into place, which is
        done now."""
        try:
            self.place.lock()
            self._file = open(self.place.journal, "a+", encoding="utf-8", newline="\n", opener=not_through_links)  # noqa: SIM115
            resumes = self._resume(identity, overwrite)
            if not self.is_published:
                self._lay_out(identity, resumes)
        except OSError as error:
            raise self.refusal(error, starting=True) from error
        except HalfbyteError:
            self.close()
            raise
        self.entries: dict[str, Entry] = {name: e for writer in self.writers for name, e in writer.entries.items()}
        self._owner = {name: writer for writer in self.writers for name in writer.entries}

    def _resume(self, identity: str, overwrite: bool) -> bool:
        self._file.seek(0)
        try:
            lines = [
                line for line in self._file.readlines() if line.endswith("\n")
            ]  # not a record that was cut off while it was written
            first, *records = [json.loads(line) for line in lines]
            same = first.get("identity") == identity
        except (ValueError, AttributeError):
            lines, same, records = [], False, []
        if WHOLE in records:
            if same and self.place.is_untouched:
                self.place.require_free(overwrite)
            if same:
                self.publish()
                return True
            self.place.settle()
            self.place.require_free(overwrite)
        resumes = same and all(self._is_laid_out(name) for name in self.shards)
        if resumes:
            self.journal = records
        self._file.truncate(len("".join(lines).encode()) if resumes else 0)
        return resumes

    def _lay_out(self, identity: str, resumes: bool) -> None:
        if not resumes:
            for path in self.partial.iterdir() if self.partial.exists() else ():
                remove(path)
        self.partial.mkdir(exist_ok=True)
        self.writers = [shard.lay_out(self.partial / name, resumes) for name, shard in self.shards.items()]
        if not resumes:
            self.record({"identity": identity})

    def _is_laid_out(self, name: str) -> bool:
        path = self.partial / name
        return path.exists() and path.stat().st_size > self.shards[name].size_bytes

    def write(self, name: str, tensor: Tensor, at: int | None = None) -> None:
        """The whole tensor, or rows of its leading dimension from `at` on."""
        self._owner[name].write(name, tensor, at)

    def companion(self, name: str) -> Path:
        """Where a small file of the output is written: next to an output that is one file, it is to bear that file's
        name."""
        return self.partial / (self.place.companion(name).name if self.place.is_file else name)

    def scratch(self, name: str) -> Path:
        """A file of work under way, which a run that is killed leaves to the next; the output will not have it."""
        return self.partial / f"{SCRATCH}{name}"

    def record(self, record: dict[str, Any]) -> None:
        """Note a step as done. What it wrote has left this process; a later check of every byte covers the rest."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def seal(self) -> None:
        """Every byte of the tensors is on the disk, and nothing else of the run."""
        for path in self.partial.glob(f"{SCRATCH}*"):
            remove(path)
        for writer in self.writers:
            writer.close()

    def publish(self) -> None:
        """Move all into place; the journal goes last."""
        if not self.is_published:
            self.record(WHOLE)
        self.is_published = True
        self.place.publish()
        self.close()

    def close(self) -> None:
        """Let go of the files; what is done stays. A journal of nothing is removed."""
        with suppress(OSError):  # a full disk may fail the last words to the journal
            for writer in self.writers:
                writer.abandon()
            if hasattr(self, "_file"):
                self._file.close()
        self.place.unlock()
        if self.place.journal.exists() and not self.partial.exists():
            remove(self.place.journal)

    def discard(self) -> None:
        """Leave nothing behind."""
        for writer in self.writers:
            writer.abandon()
        with suppress(OSError):
            remove(self.partial)
        self.close()

    def refusal(self, error: OSError, starting: bool = False) -> HalfbyteError | OSError:
        """What to raise when writing failed: of a disk that is full or not ours, the partial folder is removed."""
        if self.is_published:
            return BadRequest(
                f"{self.target} is written, and cannot be moved into place ({error.strerror}): the same command goes "
                f"on from {self.partial}"
            )
        if error.errno in FULL:
            reason = (
                f"{os.strerror(error.errno)}: it needs {_size(sum(shard.size_bytes for shard in self.shards.values()))}"
            )
        elif error.errno in REFUSED and (starting or self.place.is_ours(Path(error.filename or self.partial))):
            reason = os.strerror(error.errno)
        elif error.filename and error.strerror:
            return BadRequest(
                f"{error.filename}: {error.strerror}; what is done is kept in {self.partial}, and the same command "
                "goes on where it stopped"
            )
        else:
            return error
        self.discard()
        return BadRequest(f"{self.target} cannot be written ({reason}); nothing was left behind")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"


def check_output_path(place: OutputPath, source: Path, overwrite: bool, files: Collection[Path] = ()) -> None:
    """Refuse a target that holds something, unless it may be replaced; never the source, one of its `files`, or a
    folder around it or in it.

    This changes nothing: what a killed run has left is mended when the folder is opened again.
    """
    target, source_place = place.target, source.resolve()
    if (
        place.final == source_place
        or place.final in source_place.parents
        or place.final in {path.resolve() for path in files}
    ):
        raise BadRequest(f"the output {target} is or holds the source {source}; name another {place.kind}")
    if source_place in place.final.parents:
        raise BadRequest(
            f"the output {target} lies in the source {source}, whose files are copied; name another folder"
        )
    place.require_own()
    if not _is_whole(place.journal):
        place.require_free(overwrite)


def _is_whole(journal: Path) -> bool:
    """Whether a run was killed when only the moving into place was left. It is known by then what may be replaced."""
    try:
        return json.dumps(WHOLE) in journal.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False


@contextmanager
def kept_on_interrupt(folder: OutputFolder) -> Iterator[None]:
    """A request that cannot be met leaves nothing behind; whatever else ends a run leaves its journal, and the same
    call goes on."""
    try:
        yield
    except HalfbyteError:
        folder.discard()
        raise
    except OSError as error:
        raise folder.refusal(error) from error
    finally:
        folder.close()
