"""Planes of bits: the torch reference moves every bit where the compiled kernels do."""

import pytest
import torch

from halfbyte.kernels import choose, planes


@pytest.mark.parametrize(
    ("bits", "shift", "stride"), [(4, 0, 16), (4, 0, 32), (2, 0, 32), (2, 4, 16), (1, 2, 32), (1, 4, 1), (1, 2, 1)]
)
def test_every_implementation_packs_the_same_bytes_and_finds_the_codes_in_them(bits, shift, stride):
    codes = torch.randint(0, 256, (5, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, unpacked = [], []
    for kernels in ("fast", "reference"):
        with choose.using(kernels):
            packed.append(planes.pack(codes, bits, shift, stride))
            unpacked.append(torch.zeros_like(codes))
            planes.unpack(packed[-1], unpacked[-1], bits, shift, stride)
    assert torch.equal(*packed)
    assert torch.equal(*unpacked)
    assert torch.equal(unpacked[0], codes & (((1 << bits) - 1) << shift))
