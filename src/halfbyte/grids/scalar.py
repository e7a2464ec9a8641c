"""Scalar grids, levels times scales: every one is a value of the one class, made of a row of `halfbyte.formats`.

    int4-g128          q in [-8, 7], w = scale * q, one scale per 128 in-features
    int4-g128-asym     q in [0, 15], w = scale * (q - zero), an integer zero point per group
    int8-channel       one scale per out-feature (row); int8-tensor: one per matrix
    llm-int8           w = q * absmax / 127, one absmax per row, arithmetic and all (Dettmers et al., 2208.07339)
    fp8-e4m3-block     one scale per 128 x 128 weights, as DeepSeek's checkpoints have it; also -channel, -tensor, e5m2
    mxfp8-e4m3         a power of two (E8M0) per 32 in-features (OCP Microscaling Formats 1.0); mxfp6-e2m3 and others
    mxfp4              E2M1 under a power of two per 32 in-features, as ggml rounds to it
    nvfp4              NVIDIA's: E2M1, an E4M3 scale per 16 in-features, and one divisor for the scales of a matrix
    ggml-nvfp4         ggml's block of the same numbers: an unsigned E4M3 scale per 16, and no divisor
    iq4_nl, iq4_xs     ggml's table of 16 levels; fp16 scale per 32, or 6-bit scales per 32 under an fp16 scale per 256
    nf4-g64            bitsandbytes': 16 quantiles of a normal distribution, fp32 scale per 64 consecutive weights;
                       fp4-g64: with their 16 small floats
    nf4-g64-double     scales as indices of a table of 256, times an fp32 scale per 256 of them, an offset per matrix

Integer scales are stored in fp16, those of FP8 in fp32, unless the name ends in -fp16, -bf16 or -fp32. Codes are
unsigned in memory and those of floats and tables are the file's. An integer scale may be negative: on a symmetric grid
this gives the extra negative level to whichever side of zero needs it (as llama.cpp's Q4_0 does), and every kernel
multiplies by it just the same.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.formats import ScalarFormat
from halfbyte.grids.grid import ALL, Codes, Grid, GroupLines, Neighbours, Params, Rounder, Rows, Shape, SteppedGrid
from halfbyte.kernels import scalar
from halfbyte.kernels.levels import E2M1, FLOATS, FP4, IQ4, NF4, Even, Ladder, Levels, Table, ladder, table_of
from halfbyte.kernels.levels import Float as FloatLevels
from halfbyte.kernels.panels import Operands
from halfbyte.kernels.scales import (
    FP16,
    FP32,
    NUMBERS,
    AnyStorage,
    Byte,
    Microscale,
    Nested,
    Number,
    Scales,
    UnderGlobal,
    UnderHalf,
    pairs,
)

SCALE_DTYPES = {name: number.dtype for name, number in NUMBERS.items()}
ABSMAX_GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class ScalarGrid(SteppedGrid):
    """Levels times scales; one rounding per weight."""

    name: str
    levels: Levels
    scales: Scales

    def __str__(self) -> str:
        return self.name

    @property
    def fitting_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Small floats are rounded by their bits."""
        return 52 if isinstance(self.levels, FloatLevels) else 32

    @property
    def symmetric(self) -> bool:
        """Whether no zero point is stored."""
        return self.levels.symmetric

    @property
    def granularity(self) -> int | str:
        """Weights per group; or "channel" (the whole row), "tensor", or "block" (128 x 128)."""
        return self.scales.granularity

    @property
    def group_size(self) -> int | None:
        """In-features that share parameters (256 where scales lie under an fp16 number); None: the whole row or
        more."""
        if isinstance(self.scales.storage, UnderHalf):
            return scalar.SUPER
        return self.scales.group_size

    @property
    def midpoint(self) -> int:
        """The code of zero where levels are integers around it."""
        return 1 << (self.levels.bits - 1)

    @property
    def scale(self) -> str:
        """The precision of scales that are numbers as a Hugging Face folder has them: a key of SCALE_DTYPES; else, an
        empty string."""
        storage = self.scales.storage
        return storage.kind if isinstance(storage, Number) and storage == NUMBERS.get(storage.kind) else ""

    @property
    def nested(self) -> bool:
        """Whether scales are quantized in their turn."""
        return isinstance(self.scales.storage, Nested)

    @property
    def shares_params_across_rows(self) -> bool:
        """True for one scale per tensor, and under a divisor of the whole matrix."""
        return self.granularity == "tensor" or isinstance(self.scales.storage, UnderGlobal)

    def row_params(self, shape: Shape) -> frozenset[str]:
        """Scales and zero points, unless rows share them."""
        rows, _ = self.scales.shape(shape)
        return frozenset({"scale", "zero", "d"}) - self.scales.storage.shared if rows == shape[0] else frozenset()

    def require_fit(self, shape: Shape) -> None:
        """Raise a HalfbyteError for a matrix that the groups do not divide."""
        if self.group_size and self.granularity != "block" and shape[1] % self.group_size:
            raise BadRequest(f"{self} does not divide a row of {shape[1]}; it takes multiples of {self.group_size}")
        if self.scales.flat and isinstance(self.granularity, int):
            blocks = -(-shape[0] * shape[1] // self.granularity)
            if blocks * self.granularity // shape[0] != shape[1]:  # the number of blocks does not tell the width
                raise Unsupported(
                    f"{self} does not suit a matrix of {shape[0]} x {shape[1]}, whose last block would be nearly empty;"
                    " use smaller blocks"
                )

    def scales_shape(self, shape: Shape) -> tuple[int, int]:
        """[rows of scales, scales in each] of a matrix."""
        self.require_fit(shape)
        return self.scales.shape(shape)

    def groups(self, width: int) -> int:
        """Groups along a row of `width` in-features."""
        return self.scales_shape((1, width))[1]

    def bits(self, shape: Shape) -> float:
        """Bits of a code, and those of scales and zero points by weight."""
        rows, groups = self.scales_shape(shape)
        zeros = 0 if self.symmetric else self.levels.bits * rows * groups
        return self.levels.bits + (self.scales.storage.bits(rows * groups) + zeros) / (shape[0] * shape[1])

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """`scale`, as `scales_shape` says and as the file stores it; `zero` codes where asymmetric; and what scales
        share."""
        self.require_fit(tuple(w.shape))
        return scalar.fit(self.levels, self.scales, w, importance, search)

    def rounder(self, params: Params, shape: Shape, rows: Rows = ALL) -> Rounder:
        """Rounds one weight after another, each to the nearest level of its group."""
        lookup, size = scalar.lookup(self.levels, self.scales, params, *shape)
        return partial(scalar.round_block, scalar.of_rows(lookup, rows), size)

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """The nearest level of every weight: importance changes none."""
        return scalar.encode(self.levels, self.scales, w, params)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """Levels times scales."""
        return scalar.decode(self.levels, self.scales, codes, params)

    def neighbours(self, params: Params) -> Neighbours | None:
        """Scales near these, and codes of zero; of groups that lie in one row."""
        size, near = self.scales.granularity, self.scales.storage.near(params)
        if not isinstance(size, int) or not near or (self.scales.flat and params["scale"].shape[0] == 1):
            return None
        if "zero" in params:  # never 0: see kernels.even.settled
            top = (1 << self.levels.bits) - 1
            zeros = [(params["zero"].int() + t).clamp(1, top).to(torch.uint8) for t in (-1, 1)]
            near = pairs(near[1:-1], [{"zero": zero} for zero in zeros])
        return Neighbours(size, near)

    def numbers(self, params: Params) -> Params:
        """Scales, and what lies above them; zero points are codes."""
        return self.scales.storage.numbers(params)

    def nearest_params(self, params: Params, numbers: Params) -> Params:
        """Scales as they are stored."""
        return {**params, **self.scales.storage.nearest(params, numbers)}

    def expand(self, codes: Codes, params: Params, numbers: Params) -> Float32[Tensor, "out in"]:
        """Levels times these scales."""
        scale = self.scales.storage.combined(params, numbers, self.levels.unit)
        return scalar.multiplied(self.levels, self.scales, codes, params, scale)

    @property
    def ladder(self) -> Ladder:
        """Its levels in order."""
        return ladder(self.levels)

    def lines(self, params: Params) -> GroupLines:
        """Scales as they are stored, and zero points."""
        zero = params["zero"].float() if "zero" in params else None
        return GroupLines(self.scales.storage.load(params, self.levels.unit), zero)

    def with_lines(self, params: Params, scale: Tensor, offset: Tensor | None) -> Params:
        """The same parameters but for scales, as they can be stored."""
        return {**params, **self.scales.storage.stored(scale / self.levels.unit, params)}

    def grouped(self, x: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows groups size"]:
        """As scales are shared."""
        return self.scales.grouped(x)

    def ungrouped(self, x: Shaped[Tensor, "rows groups size"], shape: Shape) -> Shaped[Tensor, "out in"]:
        """As scales are shared."""
        return self.scales.ungrouped(x, shape)

    def operands(self, codes: Codes, params: Params) -> Operands | None:
        """Scales as they are stored, where kernels read them so."""
        out, width = codes.shape
        lines = self.scales.storage.lines(params, self.levels.unit)
        if lines is None:
            return None
        scale, group = self.scales.per_row(lines.scale, out, width)
        levels, zero = self.levels, params.get("zero")
        if isinstance(levels, Even) and levels.steps > 1:
            scale = scale.float() / levels.steps
        middle = float(levels.midpoint) if isinstance(levels, Even) and zero is None else 0.0
        return Operands(codes, levels, group or width, scale, zero, middle, d=lines.d, unit=lines.unit)

    def with_granularity(self, granularity: int | str) -> "ScalarGrid":
        """The same levels and scales in other groups."""
        return _named(self.levels, replace(self.scales, granularity=granularity))

    def with_scale(self, scale: str) -> "ScalarGrid":
        """With scales in another precision: a key of SCALE_DTYPES."""
        return _named(self.levels, replace(self.scales, storage=NUMBERS[scale]))


def made(name: str, row: ScalarFormat) -> ScalarGrid:
    """The grid that a row of formats describes."""
    return ScalarGrid(name, LEVELS[row.levels], Scales(row.granularity, STORAGES[row.scales], row.flat))


def is_integer(grid: Grid) -> TypeGuard[ScalarGrid]:
    """Whether weights are integers times numbers of 16 or 32 bits: what INT kernels multiply by."""
    return isinstance(grid, ScalarGrid) and isinstance(grid.levels, Even) and grid.scale != ""


def is_float(grid: Grid) -> TypeGuard[ScalarGrid]:
    """Whether weights are small floats."""
    return isinstance(grid, ScalarGrid) and isinstance(grid.levels, FloatLevels)


def is_absmax(grid: Grid) -> TypeGuard[ScalarGrid]:
    """Whether scales are those of consecutive weights, as bitsandbytes has them."""
    return isinstance(grid, ScalarGrid) and grid.scales.flat


def integers(bits: int, granularity: int | str, symmetric: bool = True, scale: str = "fp16") -> ScalarGrid:
    """int<bits>-<granularity>"""
    return _named(Even(bits, symmetric), Scales(granularity, NUMBERS[scale]))


def fp8(levels: str, granularity: str, scale: str = "fp32") -> ScalarGrid:
    """fp8-<levels>-<granularity>"""
    return _named(FLOATS[levels], Scales(granularity, NUMBERS[scale]))


def _absmax(table: Table, group: int, double: bool = False) -> ScalarGrid:
    """<table>-g<group>, -double"""
    storage = Nested(LARGEST) if double else LARGEST
    return ScalarGrid(f"{table}-g{group}{'-double' if double else ''}", table, Scales(group, storage, flat=True))


def _named(levels: Levels, scales: Scales) -> ScalarGrid:
    """Named by what it is made of."""
    storage, usual = scales.storage, FP16 if isinstance(levels, Even) else FP32
    granularity = f"g{scales.granularity}" if isinstance(scales.granularity, int) else scales.granularity
    asymmetric = "" if levels.symmetric else "-asym"
    stored = f"-{storage.kind}" if isinstance(storage, Number) and storage != usual else ""
    return ScalarGrid(f"{levels}-{granularity}{asymmetric}{stored}", levels, scales)


def parse(name: str) -> ScalarGrid | None:
    """The grid of a name that follows a pattern; None for other names."""
    if match := formats.INTEGERS.fullmatch(name):
        granularity = int(match["group"]) if match["group"] else match["granularity"]
        return integers(int(match["bits"]), granularity, not match["asym"], match["scale"] or "fp16")
    if match := formats.FP8.fullmatch(name):
        return fp8(match["levels"], match["granularity"], match["scale"] or "fp32")
    if match := formats.ABSMAX.fullmatch(name):
        if int(match["group"]) not in ABSMAX_GROUPS:
            sizes = ", ".join(map(str, ABSMAX_GROUPS))
            raise BadRequest(
                f"'{name}' is no grid of bitsandbytes; write nf4-g<N> or fp4-g<N>, N one of {sizes}, and -double for "
                "quantized scales"
            )
        return _absmax(TABLES[match["kind"]], int(match["group"]), bool(match["double"]))
    return None


TABLES = {"nf4": NF4, "fp4": FP4}
LARGEST = Number("fp32", torch.float32, 0.0, torch.finfo(torch.float32).max, (1.0, 1.06, 0.96, 0.92, 0.88, 0.82, 0.74))
"""The largest weight of a group, or a share of it: positive, as readers of an absmax may take for granted."""
# Two or three more candidates would lower the error of iq4_nl and iq4_xs by 0.5 to 2 %, and take a quarter as long
# again.
HALF, SINGLE = (
    Number(kind, dtype, 0.0, largest, tuple(-127 / level for level in put_on))
    for kind, dtype, largest, put_on in (
        ("fp16", torch.float16, 65504.0, (-128, -136, 116, -120, -108, 122)),
        ("fp32", torch.float32, torch.finfo(torch.float32).max, (-128, -136, 116, -120, -108)),
    )
)
"""Scales that put the weight of the largest magnitude on other levels than IQ4's last, -127."""
LEVELS: dict[str, Levels] = {
    **{f"int{bits}": Even(bits) for bits in range(2, 9)},
    **{f"int{bits}-asym": Even(bits, symmetric=False) for bits in range(2, 9)},
    "int8-absmax": Even(8, steps=127),
    **FLOATS,
    **TABLES,
    "iq4": IQ4,
    "ggml-e2m1": table_of(E2M1, 12),
    "ggml-e2m1-mx": table_of(E2M1, 8 * 2**0.5),
}
"""What formats call which numbers a code stands for."""
STORAGES: dict[str, AnyStorage] = {
    **NUMBERS,
    "absmax": LARGEST,
    "absmax-nested": Nested(LARGEST),
    "iq4-fp16": HALF,
    "iq4-under-fp16": UnderHalf(SINGLE, 32),
    "ggml-e8m0": Byte("e8m0", (0, -1, 1)),
    "ggml-e4m3": Byte("e4m3", (0, -2, -1, 1, 2, 3, 4, 5, 6)),
    "e8m0": Microscale(),
    "e4m3-under-global": UnderGlobal(),
}
"""What formats call how a scale is stored."""
SCALAR_GRIDS: dict[str, ScalarGrid] = {name: made(name, row) for name, row in formats.SCALARS.items()}
NVFP4, GGML_NVFP4, MXFP4 = (SCALAR_GRIDS[name] for name in ("nvfp4", "ggml-nvfp4", "mxfp4"))
LLM_INT8 = SCALAR_GRIDS["llm-int8"]
NVFP4_FACTOR = ScalarGrid("nvfp4-factor", E2M1, Scales(16, UnderGlobal(factor=True)))
"""nvfp4 with a factor in place of the divisor, as Model Optimizer's files have it. It is read and never fitted, so it
is in no table."""
