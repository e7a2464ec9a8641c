"""Scalar grids whose levels are a table, not evenly spaced, times a scale per group.

    iq4_nl   16 levels, fp16 scale per 32 in-features
    iq4_xs   the same levels, 6-bit scales per 32 under an fp16 scale per 256
    mxfp4    E2M1, power-of-two scale per 32 (OCP Microscaling Formats 1.0)
    nvfp4    E2M1, unsigned E4M3 scale per 16

Codes are the file's: the index of the level in its table. Levels are kept as integers: the border between two neighbours is
then a multiple of a half, so truncating twice the scaled weight finds the nearest level in a small table, exactly. As ggml
does, E2M1 is kept doubled, and scales are halved where they are decoded.

A scale is searched per group. Scales of 16 bits: each candidate puts the weight of the largest magnitude somewhere else; for
the levels that this chooses the best scale has a closed form (see rounding.py). Scales of a byte: each candidate is a
neighbour of the byte that spans the largest weight. The candidate that loses least wins.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.errors import BadRequest
from halfbyte.grids.floats import ELEMENTS, e8m0, values
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
CELLS = 512
"""Cells of half a level each, from -128 up to 128."""
SUPER = 256
"""In-features that share the fp16 scale above 6-bit scales."""
SCALE_BITS = {"fp16": 16.0, "e8m0": 8.0, "e4m3": 8.0, "6-bit": 6.0}


@dataclass(frozen=True)
class LevelGrid(Grid):
    """A table of levels; a row of LEVEL_GRIDS says all there is to say about one."""

    name: str
    levels: tuple[int, ...]
    """Value of each code, in units of the scale."""
    group: int
    """In-features that share a scale."""
    scale: str
    """How a scale is stored: a key of SCALE_BITS."""
    reach: int | float
    """The level that min-max puts the weight of the largest magnitude on."""
    tries: tuple[int, ...]
    """What a search tries: other such levels, or if scales are bytes, by how much the byte differs."""

    vector_size = 1

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        return SUPER if self.scale == "6-bit" else self.group

    def bits(self, shape: Shape) -> float:
        return 4 + SCALE_BITS[self.scale] / self.group + (16 / SUPER if self.scale == "6-bit" else 0)

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """`scale` [out, in / group], in fp16 or as the stored byte. 6-bit: as the stored 6 bits, for d * (scale - 32), and fp16
        `d` [out, in / 256]."""
        if w.shape[1] % self.group_size:
            raise BadRequest(f"{self} does not divide a row of {w.shape[1]}; it takes multiples of {self.group_size}")
        if w.device.type == "cpu":
            from halfbyte.grids import levels_numba

            return self._stored(*levels_numba.fit(self, w, importance, search))
        return self._stored(*fit_reference(self, w, importance, search))

    def _stored(self, scale: Float32[Tensor, "out groups"], integer: UInt8[Tensor, "out subs"] | None) -> Params:
        if integer is not None:
            return {"d": scale.half(), "scale": integer}
        if self.scale == "fp16":
            return {"scale": scale.half()}
        return {
            "scale": torch.searchsorted(byte_scales(self.scale).to(scale.device), scale.contiguous()).to(torch.uint8)
        }

    def scales(self, params: Params) -> Float32[Tensor, "out groups"]:
        """What each group's levels are multiplied by."""
        scale = params["scale"]
        if self.scale == "6-bit":
            d = params["d"].float()
            return (d[..., None] * (scale.float() - 32).unflatten(1, (d.shape[1], -1))).flatten(1)
        if self.scale == "fp16":
            return scale.float()
        return every_byte_scale(self.scale).to(scale.device)[scale.int()]

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        scale = self.scales(params)[:, at // self.group, None]
        code = nearest(self, w * inverse(scale))
        return code, scale * self._value(code)

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids.round_block_numba import Table, round_block

        return partial(round_block, Table(self.scales(params), *cells(self.levels)), self.group)

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        if w.device.type == "cpu":
            from halfbyte.grids import levels_numba

            return levels_numba.encode(self, w, self.scales(params))
        return encode_reference(self, w, self.scales(params))

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        values = self._value(codes).unflatten(1, (-1, self.group))
        return (self.scales(params)[..., None] * values).flatten(1)

    def _value(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int()]


# Two or three more candidates would lower the error of iq4_nl and iq4_xs by 0.5 to 2 %, and take a quarter as long again.
LEVEL_GRIDS: dict[str, LevelGrid] = {
    "iq4_nl": LevelGrid("iq4_nl", IQ4, 32, "fp16", -127, (-128, -136, 116, -120, -108, 122)),
    "iq4_xs": LevelGrid("iq4_xs", IQ4, 32, "6-bit", -127, (-128, -136, 116, -120, -108)),
    "mxfp4": LevelGrid("mxfp4", E2M1_DOUBLED, 32, "e8m0", 8 * 2**0.5, (0, -1, 1)),
    "nvfp4": LevelGrid("nvfp4", E2M1_DOUBLED, 16, "e4m3", 12, (0, -2, -1, 1, 2, 3, 4, 5, 6)),
}


@lru_cache
def byte_scales(kind: str) -> Float32[Tensor, " bytes"]:
    """What the bytes of a one-byte scale stand for, halved as ggml has it, as far as they ascend and are finite."""
    return every_byte_scale(kind)[: {"e8m0": 255, "e4m3": 127}[kind]].contiguous()


@lru_cache
def every_byte_scale(kind: str) -> Float32[Tensor, " bytes"]:
    """The same for all 256 bytes. E4M3 has no sign bit here: ggml reads 0x7F as zero and ignores the eighth bit of the others."""
    if kind == "e8m0":
        return (e8m0(torch.arange(256)) / 2).float()
    value = values(replace(ELEMENTS["e4m3"], top=480.0))[:128].repeat(2) / 2
    value[0x7F] = 0
    return value


@lru_cache
def cells(levels: tuple[int, ...]) -> tuple[UInt8[Tensor, " cells"], Float32[Tensor, " cells"]]:
    """Code and value of the level nearest to each half-open cell; where two codes have one value, the lower code."""
    table = torch.tensor(levels, dtype=torch.float32)
    centres = (torch.arange(CELLS) + 0.5) / 2 - CELLS // 4
    code = (centres[:, None] - table).abs().argmin(1)
    return code.to(torch.uint8), table[code]


def inverse(scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The reciprocal; of a scale of zero, zero: its weights take the level nearest to zero."""
    return torch.where(scale == 0, 0.0, scale.reciprocal()).clamp(-1e38, 1e38)


def nearest(grid: LevelGrid, x: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the level nearest to each scaled weight."""
    return cells(grid.levels)[0].to(x.device)[_cell(x)]


def _cell(x: Tensor) -> Tensor:
    return (2 * x + CELLS // 2).clamp(0, CELLS - 1).int()


def encode_reference(grid: LevelGrid, w: Float[Tensor, "out in"], scales: Float32[Tensor, "out groups"]) -> Codes:
    """The torch reference of `LevelGrid.encode`."""
    return nearest(grid, w.float().unflatten(1, (-1, grid.group)) * inverse(scales)[..., None]).flatten(1)


def fit_reference(
    grid: LevelGrid, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool
) -> tuple[Float32[Tensor, "out groups"], UInt8[Tensor, "out subs"] | None]:
    """The torch reference of `LevelGrid.fit`: scales as the file holds them, in float32, and 6-bit scales if the grid has them."""
    x = w.float().unflatten(1, (-1, grid.group))
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    h = h.expand(w.shape).reshape(x.shape)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    in_bytes = grid.scale in ("e8m0", "e4m3")
    largest = largest.abs() if in_bytes else largest
    scale = store(largest / grid.reach, grid.scale)
    best = torch.zeros_like(scale)
    table = byte_scales(grid.scale if in_bytes else "e8m0").to(w.device)
    middle = torch.searchsorted(table, scale)
    for t in grid.tries if search else ():
        tried = table[(middle + t).clamp(0, len(table) - 1)] if in_bytes else largest / t
        wq, qq = _moments(grid, x, h, tried)
        suited = tried if in_bytes else torch.where(qq > 0, wq / qq, 0.0)
        gain = suited * (2 * wq - suited * qq)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, suited, scale)
    if grid.scale == "6-bit":
        return _two_levels(grid, x, h, scale, search)
    return store(scale, grid.scale), None


def _moments(grid: LevelGrid, x: Tensor, h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    q = cells(grid.levels)[1].to(x.device)[_cell(x * inverse(scale)[..., None])]
    return (h * x * q).sum(-1), (h * q * q).sum(-1)


def store(scale: Float32[Tensor, "*shape"], kind: str) -> Float32[Tensor, "*shape"]:
    """The nearest scale that a file holds, in float32. A scale that has another above it is left as it is."""
    if kind == "6-bit":
        return scale
    if kind == "fp16":
        return scale.clamp(-65504, 65504).half().float()
    return byte_scales(kind).to(scale.device)[torch.bucketize(scale, borders(kind).to(scale.device), right=True)]


def borders(kind: str) -> Float32[Tensor, " borders"]:
    """Where the nearest stored scale changes. Powers of two are neighbours by ratio, not by difference."""
    table = byte_scales(kind)
    return table[:-1] * 2**0.5 if kind == "e8m0" else (table[:-1] + table[1:]) / 2


def _two_levels(grid: LevelGrid, x: Tensor, h: Tensor, scale: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """An fp16 scale such that the largest group's is -32 of it, and for each group the better of the two integers around its own.
    At the end, the best fp16 scale for the levels so chosen."""
    wide = scale.unflatten(1, (-1, SUPER // grid.group))
    top = wide.gather(-1, wide.abs().argmax(-1, keepdim=True)).squeeze(-1) / -32
    top = store(top, "fp16")
    exact = (wide * inverse(top)[..., None]).flatten(1)
    each = top.repeat_interleave(SUPER // grid.group, 1)
    if not search:
        return top, (exact.round().clamp(-32, 31) + 32).to(torch.uint8)
    best, sub, wq, qq = (
        torch.full_like(scale, -torch.inf),
        torch.zeros_like(scale),
        torch.zeros_like(scale),
        torch.zeros_like(scale),
    )
    for up in (0, 1):
        integer = (exact.floor() + up).clamp(-32, 31)
        a, b = _moments(grid, x, h, each * integer)
        gain = each * integer * (2 * a - each * integer * b)
        better = gain > best
        best, sub, wq, qq = (
            torch.where(better, new, old) for new, old in ((gain, best), (integer, sub), (a, wq), (b, qq))
        )
    numerator, denominator = (
        (sub * wq).unflatten(1, wide.shape[1:]).sum(-1),
        (sub * sub * qq).unflatten(1, wide.shape[1:]).sum(-1),
    )
    refined = store(torch.where(denominator > 0, numerator / denominator, 0.0), "fp16")
    better = refined * (2 * numerator - refined * denominator) > top * (2 * numerator - top * denominator)
    return torch.where(better, refined, top), (sub + 32).to(torch.uint8)
