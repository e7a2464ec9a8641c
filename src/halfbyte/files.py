"""Files that anybody may have made: regular ones only, no larger than their like, JSON of no more levels and values.

What is wrong with one is said in one line, as the kind of error that the caller names.
"""

import json
import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import regex

from halfbyte.errors import BadCheckpoint, HalfbyteError, brief

LARGEST = 128 << 20
"""Bytes of a file that is read whole: four times the largest tokenizer.json that is known."""
MOST_VALUES = 1 << 22
"""Values in one text of JSON, twice as many as the largest tokenizer.json has: the smallest of them take 60 bytes of
memory for each byte of the file."""
HEADER_LIMIT = 100_000_000
"""Bytes of a file's head that says what tensors follow, as in the reference implementation of safetensors."""
LARGEST_TENSOR = 1 << 48
"""Elements; more would overflow strides, even of an empty tensor."""
DEEPEST = 64
"""Objects and arrays in one another."""
PATIENCE = 0.1
"""Seconds of a pattern on one name, of which those that people write take a thousandth."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def exists(path: Path) -> bool:
    """Whether anything bears this name; of names that no file can have, nothing does."""
    return os.path.exists(path)


def path_of(source: str | Path, error: type[HalfbyteError] = BadCheckpoint) -> Path:
    """The path that somebody wrote, with their home for ~ (Path's own raises where there is no such user). Raises
    `error` for what is no path."""
    if not isinstance(source, str | os.PathLike):
        raise error(f"a checkpoint is named by its folder, its file or its hub id, not by {brief(source)}")
    return Path(os.path.expanduser(source))


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed; of a snapshot in the hub's cache, which links to its blobs: in
    these."""
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(path.resolve().is_relative_to(one) for one in homes)


def opened(path: Path, error: type[HalfbyteError] = BadCheckpoint) -> BufferedReader:
    """A file, to be read. Of pipes and devices nobody knows when they end, or whether they begin."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise error(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
        return open(path, "rb")
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror}") from None
    except ValueError as wrong:
        raise error(f"{path} cannot be read: {wrong}") from None  # a name with a NUL byte


def read_bytes(path: Path, error: type[HalfbyteError] = BadCheckpoint, most: int = LARGEST) -> bytes:
    """A whole file. Raises `error` for what is none, and for more than `most` bytes."""
    with opened(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
        except OSError as wrong:
            raise error(f"{path} cannot be read: {wrong.strerror}") from None
    if max(size, len(data)) > most:
        raise error(f"{path} has more than {most >> 20} MB, which no such file needs")
    return data


def read_text(path: Path, error: type[HalfbyteError] = BadCheckpoint, most: int = LARGEST) -> str:
    """A whole file of UTF-8. Raises `error` for what is none, and for more than `most` bytes."""
    try:
        return read_bytes(path, error, most).decode()
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not UTF-8 text: {wrong}") from None


def read_object(path: Path, error: type[HalfbyteError] = BadCheckpoint, missing: str = "") -> dict[str, Any]:
    """The object that a JSON file holds. Where there is no file: what is `missing` is said, or nothing is in it."""
    if not exists(path):
        if missing:
            raise error(missing)
        return {}
    data = read_bytes(path, error)
    try:
        value = parse_json(data)
    except ValueError as wrong:
        raise error(f"{path} is not JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object")
    return value


def parse_json(data: bytes | str, most: int = MOST_VALUES, unique: bool = False) -> Any:
    """Any value. Raises ValueError for what is no JSON of Unicode text, nests too deep or counts too much; `unique`: or
    names an entry twice."""
    text = data.decode() if isinstance(data, bytes) else data
    if sum(map(text.count, ",[{")) > most:
        raise ValueError(f"it has more than {most} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    if _nests_deeper(value, DEEPEST):
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a pair of surrogates, which is no character") from None
    return value


def matches(pattern: str, name: str, source: object) -> bool:
    """Whether a name begins as a pattern says that stands in `source`. Raises BadCheckpoint for none that ends."""
    try:
        return bool(regex.match(pattern, name, timeout=PATIENCE))
    except (regex.error, TimeoutError) as wrong:
        reason = str(wrong) or "it takes too long"
        raise BadCheckpoint(f"{source} has a pattern '{pattern:.80}' that cannot be looked for: {reason}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry is there twice")
    return entries


def _nests_deeper(value: Any, levels: int) -> bool:
    at = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        at = [
            child
            for parent in at
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return bool(at)
