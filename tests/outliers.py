"""A model's twin with outlier channels: the same function, and inputs such as large models have and small ones do not.

In models of billions of parameters a few channels of what a linear reads are 30 to 100 times as large as the rest
(Dettmers et al., 2208.07339). Here a few channels of each norm are multiplied by 32 or 64, and the columns of the
linears that read them divided by as much. Powers of two round nothing, in whatever float, so the twin's logits are the
model's own.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Of Llama's norms."""
FACTORS = torch.tensor([32.0, 64.0])


def twin(model: Path, folder: Path, channels: int = 4, seed: int = 0) -> Path:
    """Write the twin of a Llama of one file into `folder`; `channels` of each norm are outliers."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        prefix, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in READERS:
            chosen = torch.randperm(tensors[name].shape[0], generator=generator)[:channels]
            factor = FACTORS[torch.randint(len(FACTORS), (channels,), generator=generator)].to(tensors[name].dtype)
            tensors[name][chosen] *= factor
            for reader in READERS[norm]:
                tensors[f"{prefix}.{reader}.weight"][:, chosen] /= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
