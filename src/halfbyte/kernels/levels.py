"""Which numbers a code may stand for, in units of a scale: evenly spaced integers, a table, or small floats.

Each says how many `bits` a code has, which code is `nearest` to scaled weights, and what a code stands for (`decode`).
`scaled` divides weights by their scale, in the arithmetic that those who read the files use. Scales are those of a
level's `unit`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

EXPONENT = 0x7F800000
CELLS = 512
"""Cells of half a unit each, from -128 up to 128: how a table is searched."""


@dataclass(frozen=True)
class Even:
    """Codes 0 to 2^bits - 1 stand for code - zero: zero is the middle, or a parameter of the group (asymmetric)."""

    bits: int
    symmetric: bool = True
    steps: int = 1
    """Levels that a scale stands for: 1, or 127 where it is what the integer 127 means (LLM.int8())."""

    unit = 1.0

    @property
    def name(self) -> str:
        """int and the bits of a code."""
        return f"int{self.bits}"

    def __str__(self) -> str:
        return self.name

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def reach(self) -> float:
        """Where the largest weight is put: 2^bits levels span [-largest, largest], as in GPTQ and
        compressed-tensors."""
        return self.top / 2 if self.steps == 1 else 1.0

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """Weights in steps, as if multiplied by the reciprocal of the scale."""
        if self.steps == 1:
            return x * scale.reciprocal()
        return x * torch.where(scale == 0, 0.0, self.steps / scale).clamp(-1e38, 1e38)

    def nearest(self, x: Float32[Tensor, "*shape"], zero: Tensor | None = None) -> UInt8[Tensor, "*shape"]:
        """The nearest codes, ties to even; `zero` are the codes of zero, on asymmetric grids."""
        codes = torch.round(x) + (self.midpoint if zero is None else zero)
        return codes.clamp_(0, self.top).to(torch.uint8)

    def decode(
        self, codes: UInt8[Tensor, "*shape"], scale: Tensor, zero: Tensor | None = None
    ) -> Float32[Tensor, "*shape"]:
        """(code - zero) * scale."""
        values = (codes.float() - (self.midpoint if zero is None else zero)) * scale
        return values if self.steps == 1 else values * (1 / self.steps)


@dataclass(frozen=True)
class Table:
    """Levels of any kind: code k stands for levels[k] * unit."""

    name: str
    levels: tuple[int | float, ...]
    """Within [-128, 128]. Where all are integers, borders between them are multiples of a half, and a cell finds the
    nearest exactly."""
    unit: float
    """A power of two, which rounds nothing."""
    reach: int | float
    """Where min-max puts the weight of the largest magnitude, as `levels` are counted."""

    symmetric = True

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def exact(self) -> bool:
        """Whether cells find the nearest level."""
        return all(level == int(level) for level in self.levels)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """Weights over their scale; over a scale of zero, zero."""
        return x * inverse(scale)

    def nearest(self, x: Float32[Tensor, "*shape"], zero: Tensor | None = None) -> UInt8[Tensor, "*shape"]:
        """On a border, the level above if all levels are integers (as in ggml), else the one below (as in
        bitsandbytes)."""
        if self.exact:
            return cells(self)[0].to(x.device)[cell_of(x)]
        order = torch.tensor(ascending(self), dtype=torch.uint8, device=x.device)
        return order[torch.bucketize(x, borders(self).to(x.device))]

    def decode(
        self, codes: UInt8[Tensor, "*shape"], scale: Tensor, zero: Tensor | None = None
    ) -> Float32[Tensor, "*shape"]:
        """levels[code] * scale."""
        return values_of(self).to(codes.device)[codes.int()] * scale


@dataclass(frozen=True)
class Float:
    """A floating-point format of few bits, with subnormal numbers. Codes: sign, exponent, mantissa, the sign in the
    highest bit."""

    name: str
    exponent: int
    mantissa: int
    """Bits of each; the bias is 2^(exponent - 1) - 1."""
    top: float
    """The largest number."""
    round_up_threshold: float
    """A group whose largest weight is 2^k times this or more gets the power-of-two scale of one with 2^(k+1)
    (compressed-tensors mxfp_utils.py)."""

    symmetric = True
    unit = 1.0

    def __str__(self) -> str:
        return f"fp{self.bits}-{self.name}"

    @property
    def bits(self) -> int:
        """Bits of a code, sign and all."""
        return 1 + self.exponent + self.mantissa

    @property
    def reach(self) -> float:
        """Where min-max puts the largest weight: the largest number."""
        return self.top

    @property
    def low(self) -> int:
        """The exponent field, as float32 has it in its bits, of the smallest normal number."""
        return (127 - (1 << (self.exponent - 1)) + 2) << 23

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """Weights over their scale."""
        return x / scale

    def nearest(self, x: Float32[Tensor, "*shape"], zero: Tensor | None = None) -> UInt8[Tensor, "*shape"]:
        """Codes of the nearest numbers, ties to even and never beyond the largest: adding a number whose last bit is a
        step rounds to steps."""
        size = x.abs().clamp(max=self.top)
        exponent = (size.view(torch.int32) & EXPONENT).clamp(min=self.low)
        magic = exponent + ((23 - self.mantissa) << 23)
        steps = (size + magic.view(torch.float32)).view(torch.int32) - magic
        code = ((exponent - self.low) >> (23 - self.mantissa)) + steps
        return (code + (x.signbit().int() << (self.bits - 1))).to(torch.uint8)

    def value(self, codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """NaN for the codes beyond the largest number."""
        return values_of(self).to(codes.device)[codes.int()]

    def decode(
        self, codes: UInt8[Tensor, "*shape"], scale: Tensor, zero: Tensor | None = None
    ) -> Float32[Tensor, "*shape"]:
        """The number that a code is, times the scale."""
        return self.value(codes) * scale


Levels = Even | Table | Float

E4M3 = Float("e4m3", 4, 3, 448.0, 1.75)
E5M2 = Float("e5m2", 5, 2, 57344.0, 1.75)
E2M3 = Float("e2m3", 2, 3, 7.5, 1.9375)
E3M2 = Float("e3m2", 3, 2, 28.0, 1.75)
E2M1 = Float("e2m1", 2, 1, 6.0, 1.75)
FLOATS = {number.name: number for number in (E4M3, E5M2, E2M3, E3M2, E2M1)}


@lru_cache
def values_of(levels: Table | Float) -> Float32[Tensor, " codes"]:
    """What each code stands for, a table's in its units; NaN for the codes of floats beyond the largest."""
    if isinstance(levels, Table):
        return torch.tensor(levels.levels, dtype=torch.float32)
    code = torch.arange(1 << (levels.bits - 1), dtype=torch.float64)
    exponent, mantissa = code // (1 << levels.mantissa), code % (1 << levels.mantissa)
    steps = torch.where(exponent == 0, mantissa, mantissa + (1 << levels.mantissa))
    size = steps * torch.exp2(exponent.clamp(min=1) + 2 - (1 << (levels.exponent - 1)) - 1 - levels.mantissa)
    size = torch.where(size > levels.top, torch.nan, size).float()
    return torch.cat([size, -size])


class Ladder(NamedTuple):
    """Levels, the least first."""

    levels: Float32[Tensor, " levels"]
    """In units of a scale; of codes that count from a zero point, the codes."""
    codes: UInt8[Tensor, " levels"]
    """Of those that stand for the same level, the lowest."""
    ranks: UInt8[Tensor, " codes"]
    """Of each code, the number of its level."""


@lru_cache
def ladder(levels: Levels) -> Ladder:
    """The levels of a scalar grid, which numbers that are none (NaN) are not among."""
    if isinstance(levels, Even):
        codes = torch.arange(levels.top + 1)
        value = (codes - (levels.midpoint if levels.symmetric else 0)).float() / levels.steps
        return Ladder(value, codes.to(torch.uint8), codes.to(torch.uint8))
    value = values_of(levels)
    order = [code for code in value.argsort(stable=True).tolist() if value[code] == value[code]]
    distinct = [code for k, code in enumerate(order) if not k or value[code] != value[order[k - 1]]]
    ranks = torch.bucketize(value, value[distinct]).clamp(max=len(distinct) - 1)
    return Ladder(value[distinct], torch.tensor(distinct, dtype=torch.uint8), ranks.to(torch.uint8))


def table_of(levels: Float, reach: int | float) -> Table:
    """A small float as ggml rounds to it: its numbers doubled, so that they are integers, and one zero."""
    doubled = tuple(int(2 * value) for value in values_of(levels).tolist())
    return Table(levels.name, doubled, 0.5, reach)


IQ4 = Table("iq4", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), 1.0, -127)
"""ggml's kvalues_iq4nl."""
NF4 = Table(
    "nf4",
    tuple(
        128 * level
        for level in (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        )
    ), 1 / 128, 128,
)  # fmt: skip
"""16 quantiles of a normal distribution (QLoRA, Dettmers et al., 2305.14314)."""
FP4 = Table(
    "fp4", tuple(128 * sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)), 1 / 128, 128
)
"""bitsandbytes': E2M1 over 12, but for the 0.5 there is 0.0625."""


@lru_cache
def ascending(table: Table) -> tuple[int, ...]:
    """Codes by their levels. Of the two zeros of fp4, bitsandbytes on a CPU gives the second to what is greater than
    zero."""
    return tuple(sorted(range(len(table.levels)), key=lambda code: (table.levels[code], code)))


@lru_cache
def borders(table: Table) -> Float32[Tensor, " borders"]:
    """Halfway between neighbours, ascending."""
    level = values_of(table)[list(ascending(table))]
    return (level[:-1] + level[1:]) / 2


@lru_cache
def cells(table: Table) -> tuple[UInt8[Tensor, " cells"], Float32[Tensor, " cells"]]:
    """Code and value of the level nearest to each half-open cell; where two codes have one value, the lower code."""
    level = values_of(table)
    centres = (torch.arange(CELLS) + 0.5) / 2 - CELLS // 4
    code = (centres[:, None] - level).abs().argmin(1)
    return code.to(torch.uint8), level[code]


def cell_of(x: Tensor) -> Tensor:
    """The cell that scaled weights fall into; beyond the ends, the first or the last."""
    return (2 * x + CELLS // 2).clamp(0, CELLS - 1).int()


def inverse(scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The reciprocal; of a scale of zero, zero: its weights take the level nearest to zero."""
    return torch.where(scale == 0, 0.0, scale.reciprocal()).clamp(-1e38, 1e38)
