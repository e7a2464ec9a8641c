"""A packed tensor that does not fit its module is refused by name, never decoded to other values, whichever tensor of
whichever container it is."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.errors import HalfbyteError
from halfbyte.models.checkpoint import Checkpoint

MODULE = "model.layers.0.mlp.down_proj"  # 128 x 256
WRITTEN = {
    "compressed-tensors": (
        "int4-g64",
        "int3-g32-asym",
        "int8-tensor",
        "int8-channel/int8-token",
        "fp8-e4m3-channel",
        "mxfp4",
        "nvfp4",
        "mxfp8-e4m3",
    ),
    "gptq": ("int4-g64-asym", "int8-g64"),
    "awq": ("int4-g32", "int4-g128-asym"),
    "bitsandbytes": ("nf4-g64", "fp4-g64-double", "llm-int8"),
    "fp8": ("fp8-e4m3-block", "fp8-e4m3-tensor"),
}
GRIDS = [(grid, to) for to, grids in WRITTEN.items() for grid in grids]


def first(t: torch.Tensor, dim: int) -> torch.Tensor:
    return t.narrow(dim, 0, t.shape[dim] // 2) if t.dim() > dim else t[None]


DAMAGES = {
    "half of its rows": lambda t: first(t, 0),
    "half of its columns": lambda t: first(t, 1),
    "flat": lambda t: t.flatten() if t.dim() != 1 else t[None],
    "turned": lambda t: t.T if t.dim() > 1 and t.shape[0] != t.shape[1] else t[..., None],
    "empty": lambda t: t.flatten()[:0],
    "empty rows": lambda t: t[:0] if t.dim() else t[None][:0],
    "twice as long": lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
    "one number": lambda t: t.flatten()[:1],
    "a scalar": lambda t: t.flatten()[0].clone() if t.dim() else t.reshape(1, 1, 1),
    "as floats": lambda t: t.double(),
    "as bytes": lambda t: (
        t.view(torch.int64)
        if t.dtype == torch.uint8 and t.numel() % 8 == 0 and t.dim() == 1
        else t.flatten().view(torch.uint8)
    ),
    "gone": lambda t: None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("parts")
    tiny.make(home / "model", num_hidden_layers=1, num_key_value_heads=4)
    for number, (grid, to) in enumerate(GRIDS):
        halfbyte.quantize(home / "model", home / str(number), method="minmax", grid=grid, to=to)
    return {grid: home / str(number) for number, (grid, _) in enumerate(GRIDS)}


def decoded(folder: Path) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    return (
        checkpoint.read_quantized(MODULE).decode()
        if MODULE in checkpoint.quantized
        else checkpoint.read(f"{MODULE}.weight").float()
    )


@pytest.mark.slow
@pytest.mark.parametrize("grid", [grid for grid, _ in GRIDS])
def test_every_part_fits_or_is_refused(grid, folders, tmp_path):
    tensors, expected, refused = load_file(folders[grid] / "model.safetensors"), decoded(folders[grid]), 0
    parts = [name for name in tensors if name.startswith(f"{MODULE}.")]
    shutil.copytree(folders[grid], tmp_path / "damaged")
    for part in parts:
        for what, damage in DAMAGES.items():
            value = damage(tensors[part])
            changed = {name: t for name, t in tensors.items() if name != part} | (
                {part: value.contiguous()} if value is not None else {}
            )
            save_file(changed, tmp_path / "damaged" / "model.safetensors")
            try:
                found = decoded(tmp_path / "damaged")
            except HalfbyteError:
                refused += 1
            else:
                # A matrix of fewer rows may be just as whole; it is the model that has no place for it.
                assert found.shape != expected.shape or torch.equal(found, expected), (part, what)
    assert refused > len(parts) * len(DAMAGES) // 2
