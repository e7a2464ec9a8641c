"""The 4-bit grids of bitsandbytes: a table of levels from -1 to 1, times a scale per block of weights, its absmax.

    nf4-g64          16 quantiles of a normal distribution (QLoRA, Dettmers et al., 2305.14314), fp32 scale per 64 weights
    fp4-g64          E2M1 over 12, but for the 0.5 there is 0.0625; likewise
    nf4-g64-double   scales as indices of a table of 256, times an fp32 scale per 256 of them, plus an offset per matrix

Blocks follow one another through the matrix, row after row. Where they do not divide a row some belong to two rows, and the
last may be cut short. Codes are the file's: the index of the level in its table (bitsandbytes/functional.py: get_4bit_type,
quantize_4bit, create_dynamic_map).

A scale is searched per block, as in levels.py. It stays positive, which is what readers of an absmax may take for granted.
"""

import re
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape
from halfbyte.grids.levels import CELLS, inverse

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
ASCENDING: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
"""Codes by their levels. Of the two zeros of fp4, bitsandbytes on a CPU gives the second to what is greater than zero."""
GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
"""Scales that share a scale."""
TRIES = (1.0, 1.06, 0.96, 0.92, 0.88, 0.82, 0.74)
"""Scales that a search tries, as shares of the absmax."""
PATTERN = re.compile(r"(?P<kind>nf4|fp4)-g(?P<group>[1-9]\d*)(?P<double>-double)?")


@dataclass(frozen=True)
class AbsmaxGrid(Grid):
    """Sixteen levels; `group` consecutive weights of the matrix share a scale."""

    kind: str
    """A key of LEVELS."""
    group: int
    double: bool = False
    """Whether scales are quantized in their turn."""

    vector_size = 1
    pattern = PATTERN

    @classmethod
    def parse(cls, name: str) -> "AbsmaxGrid":
        match = PATTERN.fullmatch(name)
        if match is None or int(match["group"]) not in GROUPS:
            sizes = ", ".join(map(str, GROUPS))
            raise BadRequest(
                f"'{name}' is no grid of bitsandbytes; write nf4-g<N> or fp4-g<N>, N one of {sizes}, and -double for quantized scales"
            )
        return cls(match["kind"], int(match["group"]), bool(match["double"]))

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group}{'-double' if self.double else ''}"

    @property
    def group_size(self) -> int | None:
        """None: which in-features share a scale may change from row to row."""
        return None

    def blocks(self, shape: Shape) -> int:
        return -(-shape[0] * shape[1] // self.group)

    def bits(self, shape: Shape) -> float:
        blocks = self.blocks(shape)
        scales = 8 * blocks + 32 * -(-blocks // NESTED) + 32 if self.double else 32 * blocks
        return 4 + scales / (shape[0] * shape[1])

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """`scale` [out, in / group], or [1, blocks] where blocks do not divide rows, in fp32. Double: as indices of `dynamic_map`,
        with fp32 `nested` [blocks / 256] and `offset` [1]."""
        self.require_width(w.shape)
        if w.device.type == "cpu":
            from halfbyte.grids import absmax_numba

            scale = absmax_numba.fit(self, w, importance, search)
        else:
            scale = fit_reference(self, w, importance, search)
        rows = w.shape[0] if w.shape[1] % self.group == 0 else 1
        if not self.double:
            return {"scale": scale.view(rows, -1)}
        code, nested, offset = nest(scale)
        return {"scale": code.view(rows, -1), "nested": nested, "offset": offset}

    def require_width(self, shape: Shape) -> None:
        """Raise Unsupported for a matrix of few rows whose last block is so short that the number of blocks does not tell the width."""
        if self.blocks(shape) * self.group // shape[0] != shape[1]:
            raise Unsupported(
                f"{self} does not suit a matrix of {shape[0]} x {shape[1]}, whose last block would be nearly empty; use smaller blocks"
            )

    def scales(self, params: Params) -> Float32[Tensor, " blocks"]:
        """What the levels of each block are multiplied by."""
        scale = params["scale"].flatten()
        if not self.double:
            return scale
        return (
            dynamic_map().to(scale.device)[scale.int()] * params["nested"].repeat_interleave(NESTED)[: len(scale)]
            + params["offset"]
        )

    def columns(self, params: Params, rows: int, columns: list[int]) -> Float32[Tensor, "rows columns"]:
        """The scale of each weight of some in-features."""
        scales = self.scales(params)
        width = len(scales) * self.group // rows
        at = torch.tensor(columns, device=scales.device)
        return scales[(torch.arange(rows, device=scales.device)[:, None] * width + at) // self.group]

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        scale = self.columns(params, w.shape[0], [at])
        code = nearest(self.kind, w * inverse(scale))
        return code, scale * levels(self.kind).to(w.device)[code.int()]

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids.round_block_numba import Table, round_block

        scale, size = self.scales(params), self.group
        if params["scale"].shape[0] != rows:  # blocks that begin anywhere in a row: a scale for each weight
            scale, size = scale.repeat_interleave(size)[: len(scale) * size // rows * rows], 1
        half = CELLS // 4  # a table reaches from -128 to 128, these levels from -1 to 1
        value = cells(self.kind)
        return partial(round_block, Table(scale.view(rows, -1) / half, nearest(self.kind, value), value * half), size)

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        if w.device.type == "cpu":
            from halfbyte.grids import absmax_numba

            return absmax_numba.encode(self, w, self.scales(params))
        return encode_reference(self, w, self.scales(params))

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        if codes.device.type == "cpu":
            from halfbyte.grids import absmax_numba

            return absmax_numba.decode(self, codes, self.scales(params))
        return decode_reference(self, codes, self.scales(params))


@lru_cache
def levels(kind: str) -> Float32[Tensor, "16"]:
    """The value of each code, in units of the scale."""
    return torch.tensor(LEVELS[kind])


@lru_cache
def borders(kind: str) -> Float32[Tensor, "15"]:
    """Halfway between neighbours, ascending."""
    ascending = levels(kind)[list(ASCENDING[kind])]
    return (ascending[:-1] + ascending[1:]) / 2


@lru_cache
def cells(kind: str) -> Float32[Tensor, " cells"]:
    """The level nearest to the centre of each of 512 cells from -1 to 1: what a search rounds to, in one look."""
    centres = (torch.arange(CELLS) + 0.5) / (CELLS // 2) - 1
    return levels(kind)[nearest(kind, centres).int()]


@lru_cache
def dynamic_map() -> Float32[Tensor, "256"]:
    """Seven decades with 1, 2, 4, ... 64 values of either sign, each the middle of an equal part of its decade; 0 and 1
    (8-Bit Optimizers, Dettmers et al., 2110.02861)."""
    found = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (ends[:-1] + ends[1:]) / 2
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found))


def nearest(kind: str, x: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the level nearest to each scaled weight; on a border, the lower one."""
    return torch.tensor(ASCENDING[kind], dtype=torch.uint8, device=x.device)[
        torch.bucketize(x, borders(kind).to(x.device))
    ]


def nest(
    scale: Float32[Tensor, " blocks"],
) -> tuple[UInt8[Tensor, " blocks"], Float32[Tensor, " nested"], Float32[Tensor, "1"]]:
    """Scales less their mean, as indices of `dynamic_map` with a scale for each 256; and the mean."""
    offset = scale.mean()
    x = _in_blocks(scale - offset, NESTED)
    nested = x.abs().amax(1)
    table = dynamic_map().to(scale.device)
    code = torch.bucketize(x * inverse(nested)[:, None], (table[:-1] + table[1:]) / 2)
    return code.flatten()[: len(scale)].to(torch.uint8), nested, offset.view(1)


def fit_reference(
    grid: AbsmaxGrid, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool
) -> Float32[Tensor, " blocks"]:
    """The torch reference of the scales of `AbsmaxGrid.fit`, before they are quantized in their turn."""
    x = _in_blocks(w.float(), grid.group)
    h = torch.ones_like(x) if importance is None else _in_blocks(importance.expand_as(w), grid.group)
    largest = x.abs().amax(1)
    scale, best = largest, torch.zeros_like(largest)
    table = cells(grid.kind).to(w.device)
    for share in TRIES if search else ():
        q = table[((CELLS // 2) * (x * inverse(largest * share)[:, None]) + CELLS // 2).clamp(0, CELLS - 1).int()]
        wq, qq = (h * x * q).sum(1), (h * q * q).sum(1)
        better = (wq * wq > best * qq) & (wq * wq < 1e38)  # weights whose squares are not finite keep their absmax
        suited = wq / qq
        best, scale = torch.where(better, wq * suited, best), torch.where(better, suited, scale)
    return scale


def encode_reference(grid: AbsmaxGrid, w: Float[Tensor, "out in"], scales: Float32[Tensor, " blocks"]) -> Codes:
    """The torch reference of `AbsmaxGrid.encode`."""
    return (
        nearest(grid.kind, _in_blocks(w.float(), grid.group) * inverse(scales)[:, None])
        .flatten()[: w.numel()]
        .view(w.shape)
    )


def decode_reference(grid: AbsmaxGrid, codes: Codes, scales: Float32[Tensor, " blocks"]) -> Float32[Tensor, "out in"]:
    """The torch reference of `AbsmaxGrid.decode`."""
    values = levels(grid.kind).to(codes.device)[_in_blocks(codes, grid.group).int()] * scales[:, None]
    return values.flatten()[: codes.numel()].view(codes.shape)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """All numbers, row after row, in blocks; the last is filled up with zeros."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)
