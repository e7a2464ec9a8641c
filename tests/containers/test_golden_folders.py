"""Folders that GPTQModel and compressed-tensors wrote, and what they themselves read from them
(tests/goldens/make_folders.py, make_ordered.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.models.checkpoint import Checkpoint

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
    "ct-actorder": "int4-g32-bf16-actorder",
}


def read(path: Path) -> torch.Tensor:
    return Checkpoint.open(path).read_quantized(MODULE).decode()


@pytest.mark.parametrize(("name", "grid"), GRIDS.items())
def test_the_reader_decodes_what_the_writer_meant(name, grid):
    checkpoint = Checkpoint.open(FOLDERS / name)
    assert {module: str(found) for module, (found, _) in checkpoint.quantized.items()} == {MODULE: grid}
    expected = load_file(FOLDERS / name / "expected")["decoded"]
    assert torch.equal(read(FOLDERS / name)[::4].to(expected.dtype), expected)


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if "asym" in grid])
def test_zero_points_of_zero_are_among_them(name):
    """Version 1 wraps them around: read code by code, they would be 16, and neighbours one off."""
    zero = Checkpoint.open(FOLDERS / name).read_quantized(MODULE).params["zero"]
    assert (zero[:8] == 0).any()
    assert int(zero.max()) < 16


ORDERS = {"gptq-desc-act": "g_idx", "ct-actorder": "weight_g_idx"}


def regroup(name: str, groups: dict[int, int], folder: Path) -> Path:
    """The folder, where one in-feature of each of these groups is of another."""
    shutil.copytree(FOLDERS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    order = tensors[f"{MODULE}.{ORDERS[name]}"]
    for group, other in groups.items():
        order[(order == group).nonzero()[0]] = other
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(
    "wrong", [{0: 1}, {0: 4}, {0: -2}], ids=["unequal groups", "a group too many", "a negative group"]
)
def test_groups_that_are_no_order_of_columns_are_refused(name, wrong, tmp_path):
    with pytest.raises(BadCheckpoint, match="each of 4 groups 32 of 128"):
        Checkpoint.open(regroup(name, wrong, tmp_path / "model")).quantized  # noqa: B018


def test_an_order_that_its_writer_never_set_is_none(tmp_path):
    """compressed-tensors (0.12, quantization/lifecycle/forward.py) takes any -1 for that."""
    plain = Checkpoint.open(regroup("ct-actorder", {0: -1}, tmp_path / "model")).read_quantized(MODULE)
    assert str(plain.grid) == "int4-g32-bf16"
    assert torch.equal(plain.codes, Checkpoint.open(FOLDERS / "ct-actorder").read_quantized(MODULE).codes)


def test_codes_of_a_byte_each_are_read_in_their_order_too(tmp_path):
    folder = Path(shutil.copytree(FOLDERS / "ct-actorder", tmp_path / "model"))
    tensors, q = load_file(folder / "model.safetensors"), Checkpoint.open(folder).read_quantized(MODULE)
    for suffix in ("weight_packed", "weight_shape"):
        del tensors[f"{MODULE}.{suffix}"]
    tensors[f"{MODULE}.weight"] = (q.codes.to(torch.int16) - 8).to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(read(folder), q.decode())


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
    version = Checkpoint.open(tmp_path / "out").config["quantization_config"].get("checkpoint_format")
    if to == "gptq":
        assert version == ("gptq_v2" if "asym" in grid else "gptq")  # they all hold zero points of 0


def test_what_one_folder_says_of_its_version_is_not_taken_for_another():
    """Both are open at once, and only what lies in each says whether zero points are stored or one less."""
    names = ("gptq-v2-asym", "gptq-v1-asym", "gptq-v2-asym")
    checkpoints = [Checkpoint.open(FOLDERS / name) for name in names]
    assert all(checkpoint.quantized for checkpoint in checkpoints)
    for name, checkpoint in zip(names, checkpoints, strict=True):
        expected = load_file(FOLDERS / name / "expected")["decoded"]
        assert torch.equal(checkpoint.read_quantized(MODULE).decode()[::4].to(expected.dtype), expected)
