"""A GGUF that lies elsewhere, as a file with its head and a hole in the place of weights: enough for every plan."""

from collections.abc import Callable, Mapping
from pathlib import Path

from halfbyte.errors import BadRequest
from halfbyte.targets.gguf.head import PART, read_head

Fetch = Callable[[str, int, int], bytes]
"""(name of a file, first byte, how many) -> these bytes."""
BESIDE = "mmproj"
"""In the names of files that hold an encoder of images or sound, beside a model."""
ROPE = "rope_"
"""What tensors are called whose values a config is made of."""


def stand_in(files: Mapping[str, int], wanted: str | None, fetch: Fetch, folder: Path) -> Path:
    """Put it into a folder, and say where; `files` has sizes by name, and `wanted` is a part of the name of the one
    model that is meant, such as Q4_K_M. Raises BadRequest where that is none, or one of several."""
    models: dict[str, list[str]] = {}
    for name in sorted(files):
        part = PART.fullmatch(name)
        models.setdefault(part["stem"] if part else name.removesuffix(".gguf"), []).append(name)
    meant = {
        stem: parts
        for stem, parts in models.items()
        if BESIDE not in stem.lower() and (wanted is None or wanted.lower() in stem.lower())
    }
    if len(meant) != 1:
        ends = [stem.rpartition("-")[2] for stem in meant or models]
        some = " or ".join(f":{end}" for end in ends[:: max(1, len(ends) - 1)][:2])
        raise BadRequest(
            f"there are {len(models)} GGUFs, of which {len(meant)} are meant; put what the name of one says after "
            f"the repository, such as {some}"
        )
    parts = next(iter(meant.values()))
    for name in parts:
        _put(folder / Path(name).name, files[name], lambda first, count, name=name: fetch(name, first, count))
    return folder / Path(parts[0]).name


def _put(path: Path, size: int, fetch: Callable[[int, int], bytes]) -> None:
    with path.open("wb") as file:
        at = 0

        def more(count: int) -> bytes:
            nonlocal at
            data = fetch(at, min(count, size - at)) if at < size else b""
            file.write(data)
            at += len(data)
            return data

        _, tensors = read_head(more, size, path)
        for name, tensor in tensors.items():
            if name.startswith(ROPE):
                file.seek(tensor.offset)
                file.write(fetch(tensor.offset, tensor.size_bytes))
        file.truncate(size)
