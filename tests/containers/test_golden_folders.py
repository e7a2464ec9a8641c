"""Folders that GPTQModel and compressed-tensors wrote, and what they themselves read from them
(tests/goldens/make_folders.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.targets import open_checkpoint

FOLDERS = Path(__file__).parents[1] / "goldens" / "folders"
MODULE = "model.layers.0.mlp.down_proj"
GRIDS = {
    "gptq-v1": "int4-g32",
    "gptq-v1-asym": "int4-g32-asym",
    "gptq-v1-int3-asym": "int3-g32-asym",
    "gptq-v2-asym": "int4-g32-asym",
    "gptq-desc-act": "int4-g32-actorder",
    "awq-gemm": "int4-g32-asym-bf16",
    "ct-int4-g32": "int4-g32-bf16",
    "ct-int3-g64-asym": "int3-g64-asym-bf16",
    "ct-int8-channel": "int8-channel-bf16",
}


def read(path: Path) -> torch.Tensor:
    return open_checkpoint(path).read_quantized(MODULE).decode()


@pytest.mark.parametrize(("name", "grid"), GRIDS.items())
def test_the_reader_decodes_what_the_writer_meant(name, grid):
    checkpoint = open_checkpoint(FOLDERS / name)
    assert {module: str(found) for module, (found, _) in checkpoint.quantized.items()} == {MODULE: grid}
    expected = load_file(FOLDERS / name / "expected")["decoded"]
    assert torch.equal(read(FOLDERS / name)[::4].to(expected.dtype), expected)


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if "asym" in grid])
def test_zero_points_of_zero_are_among_them(name):
    """Version 1 wraps them around: read code by code, they would be 16, and neighbours one off."""
    zero = open_checkpoint(FOLDERS / name).read_quantized(MODULE).params["zero"]
    assert (zero[:8] == 0).any()
    assert int(zero.max()) < 16


@pytest.mark.parametrize(
    "wrong", [{0: 1}, {0: 4}, {0: -1}], ids=["unequal groups", "a group too many", "a negative group"]
)
def test_groups_that_are_no_order_of_columns_are_refused(wrong, tmp_path):
    folder = Path(shutil.copytree(FOLDERS / "gptq-desc-act", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    order = tensors[f"{MODULE}.g_idx"]
    for group, other in wrong.items():
        order[(order == group).nonzero()[0]] = other
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="each of 4 groups 32 of 128"):
        open_checkpoint(folder).quantized  # noqa: B018


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if "actorder" not in grid])
def test_they_convert_without_loss_or_not_at_all(name, to, tmp_path):
    grid = GRIDS[name]
    if to == "awq" and not grid.startswith("int4"):
        with pytest.raises(Unsupported, match="awq holds int4"):
            halfbyte.convert(FOLDERS / name, tmp_path / "out", to)
        return
    report = halfbyte.convert(FOLDERS / name, tmp_path / "out", to)
    assert [row["error"] for row in report["weights"]] == [0]
    assert torch.equal(read(tmp_path / "out"), read(FOLDERS / name))
    version = open_checkpoint(tmp_path / "out").config["quantization_config"].get("checkpoint_format")
    if to == "gptq":
        assert version == ("gptq_v2" if "asym" in grid else "gptq")  # they all hold zero points of 0


def test_what_one_folder_says_of_its_version_is_not_taken_for_another():
    """Both are open at once, and only what lies in each says whether zero points are stored or one less."""
    names = ("gptq-v2-asym", "gptq-v1-asym", "gptq-v2-asym")
    checkpoints = [open_checkpoint(FOLDERS / name) for name in names]
    assert all(checkpoint.quantized for checkpoint in checkpoints)
    for name, checkpoint in zip(names, checkpoints, strict=True):
        expected = load_file(FOLDERS / name / "expected")["decoded"]
        assert torch.equal(checkpoint.read_quantized(MODULE).decode()[::4].to(expected.dtype), expected)
