"""Where an output comes to lie: whole under its name, or what was there before, at whatever moment a run is killed.

Beside `NAME` lie, while it is written, `NAME.partial` (the folder that grows), `NAME.partial.jsonl` (the journal, which
says that all of these are ours) and `NAME.partial.lock`; what is replaced waits in `NAME.halfbyte-old`. The journal
goes last: as long as it is there the same command goes on, from whichever step the run was killed before.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from halfbyte.errors import BadRequest
from halfbyte.registry import FORMS

WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

PICTURE = "errors.png"
"""Of where a run lost most, in its card."""
BESIDE = ("report.json", "README.md", "recipe.yaml", "Modelfile", PICTURE)
"""What is written next to an output that is one file, under that file's name."""


def is_file(output: Path) -> bool:
    """Whether an output that is called so is one file, with its report beside it, and no folder."""
    return any(output.suffix == form.suffix for form in FORMS.values() if form.suffix)


def beside(checkpoint: Path, name: str) -> Path:
    """A file that belongs to a checkpoint: in its folder, or next to the one file under that file's name."""
    return checkpoint.with_name(f"{checkpoint.stem}.{name}") if is_file(checkpoint) else checkpoint / name


class OutputPath:
    """The names, and the steps from one to the other."""

    def __init__(self, target: Path, is_file: bool, marks: tuple[str, ...]):
        """`is_file`: the output is one file, its report beside it, and no folder; `marks`: patterns of what its folders
        hold."""
        self.target = target
        self.final = target.resolve()  # links are followed: rename would replace them
        self.is_file, self.marks = is_file, marks
        self.partial = self._named(".partial")
        self.journal = self._named(".partial.jsonl")
        self.old = self._named(".halfbyte-old")
        self._lock_path = self._named(".partial.lock")
        self._lock: filelock.BaseFileLock | None = None

    def _named(self, end: str) -> Path:
        return self.final.with_name(self.final.name + end)

    def is_ours(self, path: Path) -> bool:
        """Whether a path is one that this output uses while it is written."""
        return path in (self.journal, self._lock_path) or path.is_relative_to(self.partial)

    def lock(self) -> None:
        """Two runs that write the same output would each spoil what the other has done."""
        _make_parent(self.final)
        self.require_own()
        self._lock = _locked(self._lock_path, self.target)

    def unlock(self) -> None:
        """Nothing of the lock stays. It is the caller's to do last what says that all is done: a lock that outlives its
        run says nothing."""
        _unlocked(self._lock)
        self._lock = None

    def require_own(self) -> None:
        """Raise BadRequest if something that a run would write through, resume or delete is not what an earlier run
        left."""
        for path in (self.partial, self.journal, self.old, self._lock_path):
            require_own(path)
        if (
            self.partial.exists()
            and not self.journal.exists()
            and not (self.partial.is_dir() and not any(self.partial.iterdir()))
        ):
            raise BadRequest(
                f"{self.partial} is in the way and not of halfbyte's making; move it, or name another {self.kind}"
            )

    @property
    def kind(self) -> str:
        """ "file" or "folder", for messages."""
        return "file" if self.is_file else "folder"

    def require_free(self, overwrite: bool) -> None:
        """Raise BadRequest if what is there may not be replaced."""
        standing = (
            self.final if self.final.exists() or self.is_file else self.old
        )  # where a run was killed between two renames
        if self.is_file and standing.is_dir():
            raise BadRequest(
                f"the output {self.target} is a folder; name a file, or a folder without {self.final.suffix}"
            )
        if not self.is_file and standing.exists() and not standing.is_dir():
            raise BadRequest(f"the output {self.target} is a file; name a folder")
        taken = [path for name in BESIDE if self.is_file and (path := self.companion(name)).exists()]
        if taken and not standing.exists() and not overwrite:
            raise BadRequest(
                f"{taken[0]} is in the way of what is written beside {self.target}; name another file, move it, or "
                "give --overwrite"
            )
        if not standing.exists() or (standing.is_dir() and not any(standing.iterdir())):
            return
        if not overwrite:
            raise BadRequest(
                f"the output {self.target} exists and is kept; name another {self.kind} or give --overwrite"
            )
        if not self.is_file and not any(any(standing.glob(mark)) for mark in self.marks):
            marks = " and no ".join(mark.removeprefix("*") for mark in self.marks)
            raise BadRequest(
                f"the output {self.target} is no checkpoint (it has no {marks}), so --overwrite does not replace it"
            )

    def companion(self, name: str) -> Path:
        """A small file that belongs to the output: in its folder, or next to the one file under that file's name."""
        return self.final.with_name(f"{self.final.stem}.{name}") if self.is_file else self.final / name

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of a finished partial folder has been moved yet."""
        return (
            (self.partial / self.final.name).exists()
            if self.is_file
            else self.partial.exists() and not (self.old.exists() and not self.final.exists())
        )

    def publish(self) -> None:
        """Move all into place; from any step at which that was cut off, too. What was there before is removed only
        after that."""
        if self.is_file:
            self._publish_file()
        else:
            self._publish_folder()
        if self.old.exists():
            with suppress(OSError):  # what somebody has open may stay for now
                remove(self.old)

    def _publish_folder(self) -> None:
        if self.partial.exists():
            if self.final.exists():
                remove(self.old)
                os.rename(self.final, self.old)
            os.rename(self.partial, self.final)

    def _publish_file(self) -> None:
        """At no moment does a report stand beside a file that it does not tell of."""
        if (self.partial / self.final.name).exists():
            names = {self.companion(name).name for name in BESIDE} | {new.name for new in self._companions()}
            for standing in map(self.final.with_name, sorted(names)):
                if standing.exists():
                    self.old.mkdir(exist_ok=True)
                    os.replace(standing, self.old / standing.name)
            os.replace(self.partial / self.final.name, self.final)
        if self.partial.exists():
            for new in self._companions():
                os.replace(new, self.final.with_name(new.name))
            self.partial.rmdir()

    def _companions(self) -> list[Path]:
        return [path for path in sorted(self.partial.iterdir()) if path.name != self.final.name]

    def settle(self) -> None:
        """What was cut off while it was published is made as it was before, or done: for another command than the one
        that was killed."""
        if self.is_file and self.is_untouched:
            for path in self.old.iterdir() if self.old.exists() else ():
                os.replace(path, self.final.with_name(path.name))
            remove(self.old)
        elif not self.is_file and not self.final.exists() and self.old.exists():
            os.rename(self.old, self.final)
        elif self.is_file or not self.partial.exists():
            self.publish()


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_parent(path: Path) -> None:
    """Make the folder of a path. Raises NotADirectoryError where a file is in the way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None


def require_own(path: Path) -> None:
    """Raise BadRequest for a link, or what another user has prepared: names of partial files can be foreseen."""
    if path.is_symlink():
        raise BadRequest(f"{path} is a link, which is not written through; remove it, or name another output")
    if path.exists() and hasattr(os, "geteuid") and path.stat().st_uid not in (os.geteuid(), _owner_in(path.parent)):
        raise BadRequest(f"{path} belongs to another user; remove it, or name another output")


def _owner_in(folder: Path) -> int | None:
    """Whose a new file there is: on some shared disks, not that of the process."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _locked(path: Path, target: Path) -> filelock.BaseFileLock | None:
    """A lock that no other process has. None on a file system without locks."""
    lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BadRequest(f"another run is writing {target}; wait for it, or name another output") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None
    return lock


def _unlocked(lock: filelock.BaseFileLock | None) -> None:
    """Let go, and leave no file. Where an open file can be unlinked that comes first, so that nobody waits for one that
    is gone."""
    if lock is None:
        return
    with suppress(OSError):
        os.unlink(lock.lock_file)
    with suppress(OSError):
        lock.release()


def not_through_links(path: str, flags: int) -> int:
    """An opener for `open` that creates a file, and refuses a link."""
    return os.open(path, flags | NOT_FOLLOWED, 0o644)


def replace_text(path: Path, text: str) -> None:
    """A small file whose old or new text is there at any moment."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """The same of any content."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb", opener=not_through_links) as file:
        file.write(data)
    os.replace(partial, path)


@contextmanager
def one_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """A file that is whole under its name or not there: yields where to write it. Raises BadRequest where it cannot
    be."""
    final = target.resolve()
    partial, lock_path = (final.with_name(f"{final.name}{end}") for end in (".partial", ".partial.lock"))
    if final.is_dir():
        raise BadRequest(f"the output {target} is a folder; name a file")
    if final.exists() and not overwrite:
        raise BadRequest(f"the output {target} exists and is kept; name another file or give --overwrite")
    try:
        _make_parent(final)
        for path in (partial, lock_path):
            require_own(path)
        lock = _locked(lock_path, target)
        try:
            yield partial
        except BaseException:
            remove(partial)
            raise
        finally:
            _unlocked(lock)
        os.replace(partial, final)
    except OSError as error:
        if error.filename and Path(error.filename) not in (final, partial, lock_path, final.parent):
            raise
        raise BadRequest(f"{target} cannot be written: {error.strerror}") from None
