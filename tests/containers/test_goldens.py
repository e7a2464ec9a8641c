"""Bytes that GPTQModel decoded or packed (tests/goldens/make.py), against ours."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.containers.awq import AWQ
from halfbyte.containers.container import Container
from halfbyte.containers.gptq import GPTQ
from halfbyte.errors import BadCheckpoint
from halfbyte.grids import parse

GOLDEN = load_file(Path(__file__).parents[1] / "goldens" / "gptqmodel.safetensors")
CASES = sorted({tuple(name.split("/")[:2]) for name in GOLDEN})
SHAPE = (64, 128)


def case(kind: str, grid: str) -> tuple[Container, dict[str, torch.Tensor], torch.Tensor]:
    tensors = {name.split("/")[2]: t for name, t in GOLDEN.items() if name.startswith(f"{kind}/{grid}/")}
    # What their `pack` leaves in memory is version 2; they turn it into version 1 as they save.
    return {"awq": AWQ(), "gptq": GPTQ(), "theirs": GPTQ(version=2)}[kind], tensors, tensors.pop("decoded")


@pytest.mark.parametrize(("kind", "grid"), CASES)
def test_gptqmodel_and_we_decode_the_same_bytes_to_the_same_weights(kind, grid):
    container, tensors, decoded = case(kind, grid)
    q = container.unpack(tensors, parse(grid), SHAPE)
    # They multiply in fp16; the product of a code and an fp16 scale is exact in fp32, so one rounding is all that
    # differs.
    assert torch.equal(q.decode().half(), decoded.half())


@pytest.mark.parametrize(("kind", "grid"), CASES)
def test_we_write_the_bytes_that_were_decoded(kind, grid):
    container, tensors, _ = case(kind, grid)
    packed = container.pack(container.unpack(tensors, parse(grid), SHAPE))
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[name], tensors[name]) for name in packed)


def test_groups_in_another_order_are_not_read_as_neighbours():
    container, tensors, _ = case("theirs", "int4-g32")
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(BadCheckpoint, match="activation order"):
        container.unpack(tensors, parse("int4-g32"), SHAPE)


def test_version_1_is_one_less():
    second, tensors, _ = case("theirs", "int4-g32")
    assert (tensors["qzeros"] == -0x77777778).all()  # 0x88888888
    first = {**tensors, "qzeros": torch.full_like(tensors["qzeros"], 0x77777777)}
    grid = parse("int4-g32")
    assert GPTQ().unpack(first, grid, SHAPE).equal(second.unpack(tensors, grid, SHAPE))
