"""A GPTQ folder as activation order leaves it, of one that has none: columns of all matrices change places, and the
groups with them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from halfbyte.containers import bits


def shuffle(folder: Path, bits_per_code: int = 4) -> dict[str, torch.Tensor]:
    """Mixes the in-features of every module of `folder`; returns which columns lie where now."""
    orders: dict[str, torch.Tensor] = {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors, generator = load_file(path), torch.Generator().manual_seed(number)
        for module in [name.removesuffix(".g_idx") for name in tensors if name.endswith(".g_idx")]:
            words, groups = tensors[f"{module}.qweight"], tensors[f"{module}.g_idx"]
            orders[module] = order = torch.randperm(len(groups), generator=generator)
            tensors[f"{module}.qweight"] = bits.pack(
                bits.unpack(words.T, bits_per_code, len(groups))[:, order], bits_per_code
            ).T.contiguous()
            tensors[f"{module}.g_idx"] = groups[order]
        save_file(tensors, path, {"format": "pt"})
    return orders
