"""Experts that lie in one tensor, as modules of their own."""

from collections.abc import Mapping

import torch

from halfbyte.containers.safetensors import Entry

LOW = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def unfuse(entries: Mapping[str, Entry], parts: Mapping[str, str]) -> dict[str, Entry]:
    """All tensors, those of fused experts cut up: of home.X + ending the expert 3 becomes home.3.X.part, for every
    ending and part.

    The first ending is that of the weights. What has no row for each expert is shared by all.
    """
    weights, *others = parts
    fused = {
        name.removesuffix(weights): e
        for name, e in entries.items()
        if name.endswith(weights) and not name.endswith(tuple(others)) and len(e.shape) > 2 and e.dtype in LOW
    }
    owners = {stem + ending: (stem, part) for stem in fused for ending, part in parts.items()}
    unfused: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name not in owners:
            unfused[name] = entry
            continue
        stem, part = owners[name]
        home, _, last = stem.rpartition(".")
        for expert in range(fused[stem].shape[0]):
            unfused[f"{home}.{expert}.{last}.{part}"] = (
                entry.at(expert) if entry.shape[:1] == fused[stem].shape[:1] else entry
            )
    return unfused
