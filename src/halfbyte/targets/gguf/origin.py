"""general.* of a GGUF: what its model is called, how large it is, whence it comes and under which terms (ggml's
docs/gguf.md)."""

import re

from halfbyte.models.provenance import HUB, Provenance
from halfbyte.targets.gguf.head import Value

SIZE = re.compile(r"\d+([._]\d+)?[KMBT]", re.I)
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}
FALSE_OF_ANOTHER = re.compile(r"general\.quantized_by|quantize\.imatrix\..*")
"""What a GGUF says of how it was quantized, which is not so of what is made of it."""


def origin(source: Provenance, parameters: int) -> dict[str, Value]:
    """All that is known; nothing where nothing is."""
    parts = re.split(r"[-_ ](?=\S)", source.name)
    at = next((i for i, part in enumerate(parts) if SIZE.fullmatch(part)), None)
    strings = {
        "name": source.name,
        "basename": "-".join(parts[:at]),
        "finetune": "-".join(parts[at + 1 :]) if at is not None else None,
        "size_label": size_label(parameters),
        "organization": source.repository and source.repository.partition("/")[0],
        "source.repo_url": source.repository and HUB + source.repository,
        "license": source.license,
        "license.name": source.license_name,
        "license.link": source.license_link,
    }
    metadata = {f"general.{name}": Value("string", word) for name, word in strings.items() if word}
    if source.base_models:
        metadata["general.base_model.count"] = Value("uint32", len(source.base_models))
    for number, model in enumerate(source.base_models):
        organization, _, name = model.partition("/")
        base_model = {"name": name, "organization": organization, "repo_url": HUB + model}
        metadata |= {f"general.base_model.{number}.{key}": Value("string", word) for key, word in base_model.items()}
    lists = {"tags": source.tags, "languages": source.languages}
    return metadata | {f"general.{name}": Value("string[]", list(values)) for name, values in lists.items() if values}


def size_label(parameters: int) -> str:
    """Two digits at least, as llama.cpp's converter writes it: 135M, 8.0B."""
    unit = next((unit for unit, size in UNITS.items() if parameters > size), "K")
    count = parameters / UNITS[unit]
    return f"{count:.{max(2 - len(str(round(count)).lstrip('0')), 0)}f}{unit}"
