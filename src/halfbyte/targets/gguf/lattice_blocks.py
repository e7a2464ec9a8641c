"""Bytes of ggml's tables and lattices: IQ4, MXFP4, NVFP4, IQ3, IQ2, IQ1 (structs of ggml-common.h, little-endian).

Each type is a pair of functions between the fields of its struct, [out, blocks, bytes], and a Quantized.
"""

from functools import partial

import torch
from jaxtyping import Int, Int32, UInt8
from torch import Tensor

from halfbyte import grids
from halfbyte.grids.grid import Codes, Grid, Params
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels.lattice import NEGATIVE, codebook, entry_of_key, keys
from halfbyte.targets.gguf.layout import BlockLayout
from halfbyte.targets.gguf.names import TYPES

Raw = UInt8[Tensor, "out row_bytes"]
GATHER = 0x0102040810204080
"""Times a word of eight bytes that are 0 or 1: in its top byte, the first of them is the lowest bit."""
# Codes of iq1 by the sign of the move (up, down) and the trit (-1, 0, 1): magnitudes 1/8, 7/8, 9/8.
MOVED = ((0x81, 0x00, 0x02), (0x82, 0x80, 0x01))


def _fields(raw: UInt8[Tensor, "*shape bytes"], bits: int) -> UInt8[Tensor, "*shape fields"]:
    """Each byte split into fields, the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    return ((raw[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _bytes(fields: UInt8[Tensor, "*shape fields"], bits: int) -> UInt8[Tensor, "*shape bytes"]:
    """The inverse of `_fields`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    return (fields.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def _halves(raw: UInt8[Tensor, "*shape bytes"], run: int) -> UInt8[Tensor, "*shape codes"]:
    """4-bit codes of runs of `run`: the first half of a run in the low bits, the second in the high ones."""
    low_high = torch.stack((raw & 15, raw >> 4), -1).unflatten(-2, (-1, run // 2))
    return low_high.transpose(-1, -2).flatten(-3)


def _nibbles(codes: UInt8[Tensor, "*shape codes"], run: int) -> UInt8[Tensor, "*shape bytes"]:
    """The inverse of `_halves`."""
    halves = codes.unflatten(-1, (-1, 2, run // 2))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2)


def _as(raw: UInt8[Tensor, "*shape bytes"], dtype: torch.dtype) -> Tensor:
    return raw.contiguous().view(dtype)


def _words(values: Int[Tensor, "*shape words"], size: int) -> UInt8[Tensor, "*shape bytes"]:
    """Integers as their lowest `size` bytes."""
    return values.to(torch.int32).contiguous().view(torch.uint8).unflatten(-1, (-1, 4))[..., :size].flatten(-2)


# Tables of levels --------------------------------------------------------------------------------------------------


def _pack_iq4_nl(codes: Tensor, params: Params) -> list[Tensor]:
    return [params["scale"][..., None].view(torch.uint8), _nibbles(codes, 32)]


def _unpack_iq4_nl(d: Tensor, qs: Tensor) -> tuple[Tensor, Params]:
    return _halves(qs, 32), {"scale": _as(d, torch.float16).flatten(1)}


def _pack_iq4_xs(codes: Tensor, params: Params) -> list[Tensor]:
    scale = params["scale"].unflatten(1, (-1, 8))
    d = params["d"][..., None].view(torch.uint8)
    return [d, _bytes(scale >> 4, 2), _bytes(scale & 15, 4), _nibbles(codes, 32)]


def _unpack_iq4_xs(d: Tensor, high: Tensor, low: Tensor, qs: Tensor) -> tuple[Tensor, Params]:
    scale = _fields(low, 4) | (_fields(high, 2) << 4)
    return _halves(qs, 32), {"d": _as(d, torch.float16).flatten(1), "scale": scale.flatten(1)}


def _pack_fp4(codes: Tensor, params: Params, per_block: int, run: int) -> list[Tensor]:
    return [params["scale"].unflatten(1, (-1, per_block)), _nibbles(codes, run)]


def _unpack_fp4(scale: Tensor, qs: Tensor, run: int) -> tuple[Tensor, Params]:
    return _halves(qs, run), {"scale": scale.flatten(1)}


# Lattices ----------------------------------------------------------------------------------------------------------


def _entries(codes: UInt8[Tensor, "out blocks 256"], name: str) -> Int32[Tensor, "out blocks entries"]:
    """Which entry of the codebook each run of magnitudes is."""
    key = keys((codes & ~NEGATIVE & 0xFF).unflatten(-1, (-1, LATTICE_GRIDS[name].dimension)))
    return entry_of_key(name).to(codes.device)[key.int() & 0xFFFF].int()


def _signs(codes: UInt8[Tensor, "out blocks 256"]) -> UInt8[Tensor, "out blocks 32"]:
    words = (codes >> 7).contiguous().view(torch.int64)
    return (words * GATHER >> 56).to(torch.uint8)


def _lattice(
    entries: Tensor, signs: UInt8[Tensor, "out blocks 32"], d: Tensor, scale: Tensor, name: str
) -> tuple[Tensor, Params]:
    codes = codebook(name).to(signs.device)[entries.int()].flatten(-2) | (_fields(signs, 1) << 7)
    return codes, {"d": _as(d, torch.float16).flatten(1), "scale": scale.flatten(1)}


def _with_parity(seven: Tensor) -> UInt8[Tensor, "*shape"]:
    """The eighth sign makes the number of negative ones even."""
    folded = seven ^ (seven >> 4)
    folded = folded ^ (folded >> 2)
    folded = folded ^ (folded >> 1)
    return (seven | ((folded & 1) << 7)).to(torch.uint8)


def _signs_and_scale(codes: Tensor, scale: Tensor) -> UInt8[Tensor, "out blocks 32"]:
    """Words of four times seven signs, and four bits of scale."""
    signs = (_signs(codes).int() & 127).unflatten(-1, (8, 4))
    shifts = torch.arange(0, 28, 7, device=codes.device)
    return _words((signs << shifts).sum(-1, dtype=torch.int32) | (scale.int() << 28), 4)


def _split_signs_and_scale(raw: UInt8[Tensor, "out blocks 32"]) -> tuple[Tensor, Tensor]:
    words = _as(raw, torch.int32)
    signs = (words[..., None] >> torch.arange(0, 28, 7, device=raw.device)) & 127
    return _with_parity(signs.flatten(-2)), ((words >> 28) & 15).to(torch.uint8)


def _pack_xxs(codes: Tensor, params: Params, name: str) -> list[Tensor]:
    entries, rest = (
        _entries(codes, name).to(torch.uint8),
        _signs_and_scale(codes, params["scale"].unflatten(1, (-1, 8))),
    )
    d = params["d"][..., None].view(torch.uint8)
    if name == "iq3_xxs":
        return [d, entries, rest]
    return [d, torch.cat((entries.unflatten(-1, (8, 4)), rest.unflatten(-1, (8, 4))), -1).flatten(-2)]


def _unpack_iq2_xxs(d: Tensor, qs: Tensor) -> tuple[Tensor, Params]:
    pairs = qs.unflatten(-1, (8, 8))
    signs, scale = _split_signs_and_scale(pairs[..., 4:].flatten(-2))
    return _lattice(pairs[..., :4].flatten(-2), signs, d, scale, "iq2_xxs")


def _unpack_iq3_xxs(d: Tensor, qs: Tensor, rest: Tensor) -> tuple[Tensor, Params]:
    signs, scale = _split_signs_and_scale(rest)
    return _lattice(qs, signs, d, scale, "iq3_xxs")


def _pack_iq2_xs(codes: Tensor, params: Params) -> list[Tensor]:
    words = _entries(codes, "iq2_xs") | ((_signs(codes).int() & 127) << 9)
    return [
        params["d"][..., None].view(torch.uint8),
        _words(words, 2),
        _bytes(params["scale"].unflatten(1, (-1, 16)), 4),
    ]


def _unpack_iq2_xs(d: Tensor, qs: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
    words = _as(qs, torch.int16).int() & 0xFFFF
    return _lattice(words & 511, _with_parity(words >> 9), d, _fields(scale, 4), "iq2_xs")


def _pack_iq2_s(codes: Tensor, params: Params) -> list[Tensor]:
    entries = _entries(codes, "iq2_s")
    low, high = (entries & 255).to(torch.uint8), (entries >> 8).to(torch.uint8)
    return [
        params["d"][..., None].view(torch.uint8),
        low,
        _signs(codes),
        _bytes(high, 2),
        _bytes(params["scale"].unflatten(1, (-1, 16)), 4),
    ]


def _unpack_iq2_s(d: Tensor, low: Tensor, signs: Tensor, high: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
    return _lattice(low.int() | (_fields(high, 2).int() << 8), signs, d, _fields(scale, 4), "iq2_s")


def _pack_iq3_s(codes: Tensor, params: Params) -> list[Tensor]:
    entries = _entries(codes, "iq3_s")
    low, high = (entries & 255).to(torch.uint8), (entries >> 8).to(torch.uint8)
    return [
        params["d"][..., None].view(torch.uint8),
        low,
        _bytes(high, 1),
        _signs(codes),
        _bytes(params["scale"].unflatten(1, (-1, 8)), 4),
    ]


def _unpack_iq3_s(d: Tensor, low: Tensor, high: Tensor, signs: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
    return _lattice(low.int() | (_fields(high, 1).int() << 8), signs, d, _fields(scale, 4), "iq3_s")


def _moved(entries: Tensor, down: Tensor, d: Tensor, scale: Tensor, name: str) -> tuple[Tensor, Params]:
    trits = codebook(name).to(d.device)[entries]
    codes = torch.tensor(MOVED, dtype=torch.uint8, device=d.device)[down[..., None].int(), trits.int()]
    return codes.flatten(-2), {"d": d.flatten(1), "scale": scale.to(torch.uint8).flatten(1)}


def _entries_and_moves(codes: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Entry and whether the move is down, of each 8."""
    trit, down = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    for move, row in enumerate(MOVED):
        trit[list(row)], down[list(row)] = torch.tensor([0, 1, 2], dtype=torch.uint8), move
    key = keys(trit.to(codes.device)[codes.int()].unflatten(-1, (-1, 8)))
    entries = entry_of_key(name).to(codes.device)[key.int() & 0xFFFF].int()
    return entries, down.to(codes.device)[codes[..., ::8].int()].int()


def _pack_iq1_s(codes: Tensor, params: Params) -> list[Tensor]:
    entries, down = _entries_and_moves(codes, "iq1_s")
    high = ((entries >> 8).unflatten(-1, (8, 4)) << torch.arange(0, 12, 3, device=codes.device)).sum(
        -1, dtype=torch.int32
    )
    words = high | (params["scale"].unflatten(1, (-1, 8)).int() << 12) | (down[..., ::4] << 15)
    return [params["d"][..., None].view(torch.uint8), (entries & 255).to(torch.uint8), _words(words, 2)]


def _unpack_iq1_s(d: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Params]:
    words = _as(high, torch.int16).int() & 0xFFFF
    high = ((words[..., None] >> torch.arange(0, 12, 3, device=d.device)) & 7).flatten(-2)
    down = (words >> 15).repeat_interleave(4, -1)
    return _moved(low.int() | (high << 8), down, _as(d, torch.float16), (words >> 12) & 7, "iq1_s")


def _pack_iq1_m(codes: Tensor, params: Params) -> list[Tensor]:
    entries, down = _entries_and_moves(codes, "iq1_m")
    high = ((entries >> 8) | (down << 3)).to(torch.uint8)
    scale = (params["scale"].unflatten(1, (-1, 4, 4)).int() << torch.arange(0, 12, 3, device=codes.device)).sum(
        -1, dtype=torch.int32
    )
    d = params["d"].view(torch.int16)[..., None].int() >> torch.arange(0, 16, 4, device=codes.device)
    return [(entries & 255).to(torch.uint8), _bytes(high, 4), _words(scale | ((d & 15) << 12), 2)]


def _unpack_iq1_m(low: Tensor, high: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
    high, words = _fields(high, 4).int(), _as(scale, torch.int16).int() & 0xFFFF
    d = (
        ((words >> 12) << torch.arange(0, 16, 4, device=low.device))
        .sum(-1, keepdim=True)
        .to(torch.int16)
        .view(torch.float16)
    )
    integers = (words[..., None] >> torch.arange(0, 12, 3, device=low.device)) & 7
    return _moved(low.int() | ((high & 7) << 8), high >> 3, d, integers.flatten(-2), "iq1_m")


def _layout(name: str, block: int, sizes: tuple[int, ...], pack_fields, unpack_fields) -> BlockLayout:
    """`sizes`: bytes of the fields of the struct, in their order."""

    def pack(q: Quantized) -> Raw:
        return torch.cat(pack_fields(q.codes.unflatten(1, (-1, block)), q.params), -1).flatten(1)

    def unpack(raw: Raw, grid: Grid) -> Quantized:
        codes, params = unpack_fields(*raw.unflatten(1, (-1, sum(sizes))).split(sizes, -1))
        return Quantized(grid, _contiguous(codes.flatten(1)), params)

    return BlockLayout(grids.parse(TYPES[name]), block, sum(sizes), pack, unpack)


def _contiguous(codes: Codes) -> Codes:
    return codes.contiguous()


LATTICE_LAYOUTS: dict[str, BlockLayout] = {
    "IQ4_NL": _layout("IQ4_NL", 32, (2, 16), _pack_iq4_nl, _unpack_iq4_nl),
    "IQ4_XS": _layout("IQ4_XS", 256, (2, 2, 4, 128), _pack_iq4_xs, _unpack_iq4_xs),
    "MXFP4": _layout("MXFP4", 32, (1, 16), partial(_pack_fp4, per_block=1, run=32), partial(_unpack_fp4, run=32)),
    "NVFP4": _layout("NVFP4", 64, (4, 32), partial(_pack_fp4, per_block=4, run=16), partial(_unpack_fp4, run=16)),
    "IQ3_S": _layout("IQ3_S", 256, (2, 64, 8, 32, 4), _pack_iq3_s, _unpack_iq3_s),
    "IQ3_XXS": _layout("IQ3_XXS", 256, (2, 64, 32), partial(_pack_xxs, name="iq3_xxs"), _unpack_iq3_xxs),
    "IQ2_S": _layout("IQ2_S", 256, (2, 32, 32, 8, 8), _pack_iq2_s, _unpack_iq2_s),
    "IQ2_XS": _layout("IQ2_XS", 256, (2, 64, 8), _pack_iq2_xs, _unpack_iq2_xs),
    "IQ2_XXS": _layout("IQ2_XXS", 256, (2, 64), partial(_pack_xxs, name="iq2_xxs"), _unpack_iq2_xxs),
    "IQ1_S": _layout("IQ1_S", 256, (2, 32, 16), _pack_iq1_s, _unpack_iq1_s),
    "IQ1_M": _layout("IQ1_M", 256, (32, 16, 8), _pack_iq1_m, _unpack_iq1_m),
}
