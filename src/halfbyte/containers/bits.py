"""Dense little-endian bit packing, shared by every container: code j of a run lies at bits [b*j, b*j + b)."""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "rows width"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack along the last dimension into 32-bit words; the end of a row is padded with zero codes."""
    rows, width = codes.shape
    codes = codes.reshape(-1).view(
        rows, width
    )  # .contiguous() leaves a single row of a transposed matrix its odd stride
    words = -(-width * bits // 32)
    if width * bits % 32 and (missing := -(-words * 32 // bits) - width) > 0:
        codes = torch.nn.functional.pad(codes, (0, missing))
    # Neighbours are folded together in place of a loop over bits: a view as wider integers puts 8/b codes side by side.
    if bits == 8:
        return codes.contiguous().view(torch.int32)
    if bits == 4:
        pairs = codes.contiguous().view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8).view(torch.int32)
    if bits == 2:
        quads = codes.contiguous().view(torch.int32)
        return (quads | (quads >> 6) | (quads >> 12) | (quads >> 18)).to(torch.uint8).view(torch.int32)
    return _pack_straddling(codes, bits)[:, :words].contiguous()


def unpack(words: Int32[Tensor, "rows words"], bits: int, width: int) -> UInt8[Tensor, "rows width"]:
    """The inverse of `pack`."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :width].contiguous()
    if bits == 4:
        pairs = words.contiguous().view(torch.uint8).to(torch.int16)
        return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)[:, :width].contiguous()
    if bits == 2:
        quads = words.contiguous().view(torch.uint8).to(torch.int32)
        return (
            ((quads | (quads << 6) | (quads << 12) | (quads << 18)) & 0x03030303)
            .view(torch.uint8)[:, :width]
            .contiguous()
        )
    return _unpack_straddling(words, bits)[:, :width].contiguous()


def _pack_straddling(codes: Tensor, bits: int) -> Tensor:
    """32 codes fill exactly `bits` words, whatever the width of a code."""
    rows = codes.shape[0]
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, codes.shape[1], bits, dtype=torch.int64, device=codes.device)
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        code = codes[..., j].long()
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return _low_32_bits(words).view(rows, -1)


def _unpack_straddling(words: Tensor, bits: int) -> Tensor:
    rows = words.shape[0]
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits).long() & 0xFFFFFFFF
    codes = torch.empty(rows, words.shape[1], 32, dtype=torch.uint8, device=words.device)
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        code = words[..., word] >> shift
        if shift + bits > 32:
            code = code | (words[..., word + 1] << (32 - shift))
        codes[..., j] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows, -1)


def _low_32_bits(words: Tensor) -> Tensor:
    return (((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
