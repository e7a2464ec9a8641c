"""Bit packing, against strings of bits that Python counts by hand, and against compressed-tensors' own packer."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from halfbyte.containers import bits

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 97, 160)


def codes_of(width_bits, rows, width, seed=0):
    return torch.randint(0, 1 << width_bits, (rows, width), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def words_by_hand(row, width_bits):
    """The row as one long binary number, first code in the lowest bits, cut into signed 32-bit words."""
    text = "".join(format(code, f"0{width_bits}b")[::-1] for code in row)
    text += "0" * (-len(text) % 32)
    words = [int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("width_bits", range(2, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_writes_the_bits_one_after_another(width_bits, width):
    codes = codes_of(width_bits, 5, width)
    assert bits.pack(codes, width_bits).tolist() == [words_by_hand(row, width_bits) for row in codes.tolist()]


@pytest.mark.parametrize("width_bits", range(2, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_agrees_with_compressed_tensors_and_unpack_is_its_inverse(width_bits, width):
    codes = codes_of(width_bits, 5, width)
    signed = (codes.int() - (1 << (width_bits - 1))).to(torch.int8)
    words = bits.pack(codes, width_bits)
    assert torch.equal(words, pack_to_int32(signed, width_bits))
    assert torch.equal(unpack_from_int32(words, width_bits, signed.shape), signed)
    assert torch.equal(bits.unpack(words, width_bits, width), codes)


@pytest.mark.parametrize("width_bits", range(2, 9))
def test_largest_codes_and_strided_views(width_bits):
    codes = torch.full((40, 6), (1 << width_bits) - 1, dtype=torch.uint8)
    codes[1::2] = 0
    words = bits.pack(codes.T, width_bits)
    assert words.tolist() == [words_by_hand(row, width_bits) for row in codes.T.tolist()]
    assert torch.equal(bits.unpack(words.T.contiguous().T, width_bits, 40), codes.T)
