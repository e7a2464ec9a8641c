"""The block formats of llama.cpp that differ in data only: K-quants, and the older types with a scale and a minimum.

    q4_k, q5_k           blocks of 256 in groups of 32: w = (d * scale) q - dmin * min, d and dmin fp16,
                         scale and min 6-bit integers
    q2_k                 the same in groups of 16, with 4-bit scale and min
    q3_k, q6_k           groups of 16, w = (d * scale) (q - zero), scale a signed integer of 6 or 8 bits
    q4_1, q5_1           blocks of 32, w = d q + m, both fp16
    tq1_0, tq2_0         blocks of 256, w = d (q - 1), q in 0..2

Codes are unsigned in memory. Layouts and arithmetic: ggml-quants.c and gguf-py's quants.py, whose names d and dmin are
kept; `decode` does the same float32 operations in the same order. q4_0, q5_0 and q8_0 are integer grids: int4-g32,
int5-g32, int8-g32.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.formats import KFormat
from halfbyte.grids.grid import ALL, Codes, GroupLines, Neighbours, Params, Rounder, Rows, Shape, SteppedGrid
from halfbyte.kernels import kquant, scalar
from halfbyte.kernels.levels import Even, Ladder
from halfbyte.kernels.panels import Operands


@dataclass(frozen=True)
class KQuant(KFormat, SteppedGrid):
    """Evenly spaced levels per group; the scales of a block's groups are small integers times one fp16 number.

    Params, by name: `d` fp16 [out, blocks]; with two levels `scale` (uint8 or int8) [out, groups]; and with a minimum
    `dmin` fp16 [out, blocks] and `min` uint8 [out, groups], or with one level `m` fp16 [out, blocks].
    """

    @classmethod
    def parse(cls, name: str) -> "KQuant":
        """The K-quant of a name. Raises UnknownName."""
        if name not in KQUANTS:
            raise UnknownName("K-quant", name, KQUANTS)
        return KQUANTS[name]

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        """In-features of a block, which share the fp16 numbers."""
        return self.super_block

    @property
    def weighs_magnitude(self) -> bool:
        """Four or eight levels: KL on bookworm-6m .0169 in place of .0178 with Q3_K_M; Q4_K and integers of 4 bits lose
        more by it."""
        return self.top in (3, 7)

    def blocks(self, width: int) -> int:
        """Blocks along a row of `width` in-features."""
        if width % self.group_size:
            raise BadRequest(
                f"{self} packs blocks of {self.group_size} in-features, which do not divide a row of {width}"
            )
        return width // self.group_size

    def bits(self, shape: Shape) -> float:
        """Bits of a block over its weights; all is counted, padding too."""
        self.blocks(shape[1])
        return self.stored_bits / self.group_size

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """A search in two steps, see `kernels.kquant`. Raises BadRequest where blocks do not divide a row."""
        self.blocks(w.shape[1])
        return kquant.fit(self, w, importance, search)

    @property
    def ladder(self) -> Ladder:
        """Integers around the code that stands for the offset."""
        codes = torch.arange(self.top + 1, dtype=torch.uint8)
        return Ladder(codes.float() - self.middle, codes, codes)

    def lines(self, params: Params) -> GroupLines:
        """Scale and offset of every group: a code q stands for scale * (q - zero) + offset, rounded after each
        operation."""
        d = params["d"].float()
        if self.scales is None:
            return GroupLines(d, offset=params["m"].float() if self.has_minimum else None)
        out, blocks = d.shape
        scale = (d[..., None] * params["scale"].view(out, blocks, -1)).view(out, -1)
        if not self.has_minimum:
            return GroupLines(scale)
        minimum = params["dmin"].float()[..., None] * params["min"].view(out, blocks, -1)
        return GroupLines(scale, offset=-minimum.view(out, -1))

    def with_lines(self, params: Params, scale: Tensor, offset: Tensor | None) -> Params:
        """The integers nearest to these below the same fp16 numbers; of one level, these numbers."""
        return params | kquant.stored_lines(self, params, scale, offset)

    def grouped(self, x: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows groups size"]:
        """Runs of in-features."""
        return x.reshape(x.shape[0], -1, self.group)

    def ungrouped(self, x: Shaped[Tensor, "rows groups size"], shape: Shape) -> Shaped[Tensor, "out in"]:
        """Runs of in-features."""
        return x.reshape(shape)

    def rounder(self, params: Params, shape: Shape, rows: Rows = ALL) -> Rounder:
        """Rounds one weight after another, each to a level of its group."""
        scale, _, offset = self.lines(params)
        zero = torch.full_like(scale, self.middle, dtype=torch.uint8)
        base = torch.zeros_like(scale) if offset is None else offset
        lines = scalar.EvenLookup(kquant.safe_scale(scale), zero, base, self.top)
        return partial(scalar.round_block, scalar.of_rows(lines, rows), self.group)

    def neighbours(self, params: Params) -> Neighbours:
        """Integers near these; with one level of scales, numbers."""
        return Neighbours(self.group, kquant.near(self, params))

    def row_params(self, shape: Shape) -> frozenset[str]:
        """All of them: each block lies in one row."""
        return frozenset({"d", "dmin", "m", "scale", "min"})

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """Nearest codes, one by one: importance changes none."""
        self.blocks(w.shape[1])
        scale, _, offset = self.lines(params)
        return kquant.encode(self, w, scale, offset)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """The float32 operations of ggml-quants.c, in their order."""
        scale, _, offset = self.lines(params)
        return self.values(
            codes.view(*scale.shape, -1), scale[..., None], None if offset is None else offset[..., None]
        ).view(codes.shape)

    def numbers(self, params: Params) -> Params:
        """All of them: the fp16 numbers, and the integers under them."""
        return {name: value.float() for name, value in params.items()}

    def nearest_params(self, params: Params, numbers: Params) -> Params:
        """Each rounded; d and dmin are not negative, and the largest finite."""
        low, high = self.scales or (0, 0)
        limits = {"d": (0, 65504), "dmin": (0, 65504), "m": (-65504, 65504), "scale": (low, high), "min": (0, high)}
        rounded = {}
        for name, value in numbers.items():
            value = value if params[name].is_floating_point() else value.round()
            rounded[name] = value.clamp(*limits[name]).to(params[name].dtype)
        return {**params, **rounded}

    def expand(self, codes: Codes, params: Params, numbers: Params) -> Float32[Tensor, "out in"]:
        """By the same operations, all of which are torch's."""
        return self.decode(codes, {**params, **numbers})

    def operands(self, codes: Codes, params: Params) -> Operands | None:
        """Integers under fp16 numbers, as they are."""
        levels = Even(self.top.bit_length())
        if self.scales is None:
            return Operands(codes, levels, self.group, params["d"], middle=self.middle, offset=params.get("m"))
        scale, minimum = params["scale"], params.get("min")
        is_split = self.scales[1] < 16
        return Operands(
            codes,
            levels,
            self.group,
            scale if minimum is None or not is_split else scale | minimum << 4,
            middle=self.middle,
            offset=None if is_split else minimum,
            is_split=is_split,
            d=params["d"],
            dmin=-params["dmin"] if self.has_minimum else None,
        )

    def values(self, codes: UInt8[Tensor, "*shape"], scale: Tensor, offset: Tensor | None) -> Float32[Tensor, "*shape"]:
        """What codes stand for, given scale and offset of each."""
        product = (codes.float() - self.middle) * scale
        return product if offset is None else product + offset


KQUANTS: dict[str, KQuant] = {name: KQuant(**vars(row)) for name, row in formats.KQUANTS.items()}
