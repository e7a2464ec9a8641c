"""The digest of every part of a file: tensor by tensor, entry by entry, and of the whole of it.

Left out is what tells of the run and not of the result: how long it took and how much memory (entries of report.json,
which is therefore compared entry by entry and not as a whole, and a line of the card), and where the folder lies.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import yaml

Parts = dict[str, str]
"""Digests by the name of what they are of; the last is the file's."""
OF_THE_RUN = {"seconds", "peak_memory_bytes", "planned", "measured"}
TOOK = re.compile(rb"^It took [0-9.]+ s( and [^(]*? of memory)?\.", re.MULTILINE)
"""The same in a model's card."""
WHOLE = "all of it"


def digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=10).hexdigest()


def parts_of(path: Path) -> Parts:
    if path.name.endswith("report.json"):
        return told(path.read_text(encoding="utf-8"))
    read: Callable[[Path], Parts] = READERS.get(path.suffix, lambda path: {})
    return read(path) | {WHOLE: digest(TOOK.sub(b"", path.read_bytes()) if path.suffix == ".md" else path.read_bytes())}


def told(text: str) -> Parts:
    """Of JSON, but for what is of the run."""
    value = without(json.loads(text.replace(os.getcwd(), ".")))
    return entries(value) if isinstance(value, dict) else {WHOLE: of_value(value)}


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without(one) for name, one in value.items() if name not in OF_THE_RUN}
    return [without(one) for one in value] if isinstance(value, list) else value


def entries(value: dict[str, Any]) -> Parts:
    return {name: of_value(one) for name, one in value.items()}


def of_value(value: Any) -> str:
    return digest(json.dumps(value, default=str).encode())


def of_json(path: Path) -> Parts:
    value = json.loads(path.read_text(encoding="utf-8"))
    return entries(value) if isinstance(value, dict) else {}


def of_yaml(path: Path) -> Parts:
    return entries(yaml.safe_load(path.read_text(encoding="utf-8")))


def of_safetensors(path: Path) -> Parts:
    """Of each tensor its dtype, shape and bytes."""
    data = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header, found = json.loads(bytes(data[8:start])), {}
    for name, entry in header.items():
        if name == "__metadata__":
            found[name] = of_value(entry)
            continue
        first, last = entry["data_offsets"]
        found[name] = of_value([entry["dtype"], entry["shape"], digest(data[start + first : start + last])])
    return found


def of_gguf(path: Path) -> Parts:
    """As llama.cpp's own package reads it: of each tensor its type, shape and bytes, and each entry of the metadata."""
    reader = gguf.GGUFReader(path)
    found = {}
    for tensor in reader.tensors:
        found[tensor.name] = of_value([tensor.tensor_type.name, tensor.shape.tolist(), digest(tensor.data.tobytes())])
    for name, field in reader.fields.items():
        found[name] = digest(b"".join(part.tobytes() for part in field.parts))
    return found


READERS = {".json": of_json, ".yaml": of_yaml, ".safetensors": of_safetensors, ".gguf": of_gguf}
