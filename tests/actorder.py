"""A folder as activation order leaves it, of one that has none: columns of all matrices change places, and the groups
with them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from halfbyte.containers import bits

GROUPS = {"qweight": "g_idx", "weight_packed": "weight_g_idx"}
"""The tensor of codes, and that of the groups: of GPTQ, which packs along in-features down the rows, and of
compressed-tensors."""


def shuffle(folder: Path, bits_per_code: int = 4, group_size: int = 32) -> dict[str, torch.Tensor]:
    """Mixes the in-features of every module of `folder`; returns which columns lie where now."""
    orders: dict[str, torch.Tensor] = {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors, generator = load_file(path), torch.Generator().manual_seed(number)
        for module, _, suffix in [name.rpartition(".") for name in tensors if name.rpartition(".")[2] in GROUPS]:
            words = tensors[f"{module}.{suffix}"]
            words = words.T if suffix == "qweight" else words
            width = words.shape[1] * 32 // bits_per_code
            orders[module] = order = torch.randperm(width, generator=generator)
            mixed = bits.pack(bits.unpack(words, bits_per_code, width)[:, order], bits_per_code)
            tensors[f"{module}.{suffix}"] = (mixed.T if suffix == "qweight" else mixed).contiguous()
            tensors[f"{module}.{GROUPS[suffix]}"] = (order // group_size).int()
        save_file(tensors, path, {"format": "pt"})
    return orders
