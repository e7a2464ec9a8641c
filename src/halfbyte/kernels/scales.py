"""How many weights share a scale (granularity), and how a scale is stored (storage): two kinds of data.

    Scales(128, FP16)             one for 128 in-features, in fp16
    Scales("channel", FP32)       one for an out-feature (row); "tensor": for the matrix; "block": for 128 x 128 weights
    Scales(64, FP32, flat=True)   one for 64 weights that follow one another through the matrix, whatever the rows

A storage says which parameters of a matrix are stored and what they mean (`load`), which scale spans a largest weight
(`spanning`), and which scales a search may try (`tried`). All that it returns is rounded to what a file holds. It
also says which parameters are numbers that may change by a little while codes stay (`numbers`), what those make
(`combined`), and what a file holds of them (`nearest`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Integer, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.levels import E2M1, E4M3, Levels, inverse, values_of
from halfbyte.kernels.levels import Float as FloatLevels

Params = dict[str, Tensor]
SIDE = 128
"""Rows, and in-features, of a block."""
# Scales of 16 bits stay where fp16 and bf16 both hold every bit of a bf16 number: files in fp16 of bf16 models need
# both. A scale that became zero or infinite would take its weights with it.
SMALLEST, LARGEST = 2.0**-17, 65280.0
DIVISOR = 1024.0
"""Of the scales of NVFP4: theirs are then normal numbers for groups whose largest weight is anything from 0.0001 to
2.6."""
NESTED = 256
"""Scales that share a scale."""
SUPER = 256
"""In-features that share the fp16 scale above 6-bit scales."""
NEAR = (-0.04, -0.02, 0.02, 0.04)
"""By how much of itself a scale that is a number changes, to be one near it."""
STEPS = (-1, 1)
"""... and a scale of a byte or less."""
PHASES = tuple(2 ** (k / 4) for k in range(4))
"""A float is about as precise wherever it lies: what a search can win is within an octave."""


class Lines(NamedTuple):
    """Scales as they are stored, for kernels that read them so: scale * d * unit."""

    scale: Shaped[Tensor, "rows groups"]
    """Of 16 or 32 bits, an integer of 8 under a `d`, or an E4M3 number."""
    d: Float[Tensor, "rows supers"] | None = None
    unit: float = 1.0


class Storage(ABC):
    """How scales are stored: a value, equal by value."""

    def bits(self, count: int) -> float:
        """Stored bits of so many scales of a matrix."""
        return 8.0 * count

    @property
    def shared(self) -> frozenset[str]:
        """Parameters that the scales of a matrix share."""
        return frozenset()

    @abstractmethod
    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """What a level's unit is multiplied by."""

    @abstractmethod
    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """What comes nearest to these scales, of what lies below the numbers that others share."""

    def lines(self, params: Params, unit: float) -> Lines | None:
        """The same, with no more bits than are stored; None where that cannot be."""
        return Lines(self.load(params, unit))

    def near(self, params: Params) -> list[Params]:
        """What each scale may become on its own; the parameters that change."""
        return []

    def numbers(self, params: Params) -> Params:
        """Parameters that each belong to a few weights, as the numbers that they stand for in float32: none where a
        step from one to the next is a factor of two."""
        return {}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """`load` with these numbers in place of what is stored of them; differentiable."""
        return self.load(params, unit)

    def nearest(self, params: Params, numbers: Params) -> Params:
        """The parameters that are nearest to these numbers."""
        return params


class Searched(Storage):
    """One scale for a group: which ones a search may take."""

    @abstractmethod
    def spanning(self, largest: Float32[Tensor, "rows groups"], levels: Levels, search: bool) -> Params:
        """Parameters that put the largest weights on the largest level (min-max), before a search or for good."""

    @abstractmethod
    def tried(self, plain: Params) -> list[Params]:
        """What a search may take in place of the plain ones, those among them first."""


@dataclass(frozen=True)
class Number(Searched):
    """A number of 16 or 32 bits."""

    kind: str
    dtype: torch.dtype
    smallest: float
    largest: float
    tries: tuple[float, ...] = PHASES
    """Scales that a search tries, as shares of the one that spans the largest weight."""

    def bits(self, count: int) -> float:
        """16 or 32 for each."""
        return self.dtype.itemsize * 8.0 * count

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The number itself."""
        scale = params["scale"].float()
        return scale if unit == 1 else scale * unit

    def lines(self, params: Params, unit: float) -> Lines:
        """The number itself, in its own bits."""
        return Lines(params["scale"], unit=unit)

    def numbers(self, params: Params) -> Params:
        """The number itself."""
        return {"scale": params["scale"].float()}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The number itself."""
        return self.load(numbers, unit)

    def nearest(self, params: Params, numbers: Params) -> Params:
        """The number rounded, of the sign that it had."""
        scale, before = numbers["scale"], params["scale"].float()
        return {**params, "scale": self.store(torch.where(scale * before < 0, 0 * before, scale))}

    def spanning(self, largest: Float32[Tensor, "rows groups"], levels: Levels, search: bool) -> Params:
        """The largest weight over the largest level."""
        scale = largest / (levels.reach * levels.unit)
        return {"scale": self.store(torch.where(scale == 0, 1.0, scale) if self.smallest else scale)}

    def tried(self, plain: Params) -> list[Params]:
        """Shares of the plain scale."""
        return [{"scale": self.store(plain["scale"].float() * share)} for share in self.tries]

    def near(self, params: Params) -> list[Params]:
        """A little finer, a little coarser."""
        return [{"scale": self.store(params["scale"].float() * (1 + share))} for share in NEAR]

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest numbers."""
        return {"scale": self.store(scale)}

    def store(self, scale: Float32[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Never infinite, and never zero where `smallest` is more."""
        return torch.copysign(scale.abs().clamp(self.smallest, self.largest), scale).to(self.dtype)


@dataclass(frozen=True)
class Byte(Searched):
    """A power of two ("e8m0") or an unsigned number ("e4m3") in a byte, as ggml has them."""

    kind: str
    tries: tuple[int, ...]
    """Bytes that a search tries, less the one that spans the largest weight."""

    def every(self, unit: float) -> Float32[Tensor, " bytes"]:
        """What all 256 bytes stand for. E4M3 has no sign bit here: ggml reads 0x7F as zero and ignores the eighth bit
        of the others."""
        if self.kind == "e8m0":
            return (e8m0(torch.arange(256)) * unit).float()
        value = values_of(FloatLevels("e4m3", 4, 3, 480.0, 1.75))[:128].repeat(2) * unit
        value[0x7F] = 0
        return value

    def ascending(self, unit: float) -> Float32[Tensor, " bytes"]:
        """What the bytes that are written stand for, from the smallest."""
        return self.every(unit)[: {"e8m0": 255, "e4m3": 127}[self.kind]].contiguous()

    def borders(self, unit: float) -> Float32[Tensor, " borders"]:
        """Where the nearest changes. Powers of two are neighbours by ratio, not by difference."""
        table = self.ascending(unit)
        return table[:-1] * 2**0.5 if self.kind == "e8m0" else (table[:-1] + table[1:]) / 2

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """What the byte stands for."""
        return self.every(unit).to(params["scale"].device)[params["scale"].int()]

    def lines(self, params: Params, unit: float) -> Lines:
        """A power of two is a bfloat16, and an unsigned E4M3 number one without its sign."""
        if self.kind == "e8m0":
            return Lines(self.load(params, unit).bfloat16())
        byte = params["scale"] & 0x7F
        return Lines(torch.where(byte == 0x7F, 0, byte).view(torch.float8_e4m3fn), unit=unit)

    def numbers(self, params: Params) -> Params:
        """What an E4M3 number stands for."""
        return {"scale": self.load(params)} if self.kind == "e4m3" else {}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The number times the unit."""
        return numbers["scale"] * unit

    def nearest(self, params: Params, numbers: Params) -> Params:
        """The nearest E4M3 number."""
        return self.stored(numbers["scale"].contiguous(), params)

    def spanning(self, largest: Float32[Tensor, "rows groups"], levels: Levels, search: bool) -> Params:
        """The byte nearest to the largest weight over the largest level."""
        border = self.borders(levels.unit).to(largest.device)
        return {"scale": torch.bucketize(largest / levels.reach, border, right=True).to(torch.uint8)}

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest bytes."""
        return {"scale": torch.bucketize(scale, self.borders(1.0).to(scale.device), right=True).to(torch.uint8)}

    def tried(self, plain: Params) -> list[Params]:
        """Bytes near the plain one."""
        return self._moved(plain, self.tries)

    def near(self, params: Params) -> list[Params]:
        """Bytes near these."""
        return self._moved(params, STEPS)

    def _moved(self, params: Params, steps: tuple[int, ...]) -> list[Params]:
        most = {"e8m0": 254, "e4m3": 126}[self.kind]
        return [{"scale": (params["scale"].int() + t).clamp(0, most).to(torch.uint8)} for t in steps]


@dataclass(frozen=True)
class Microscale(Searched):
    """A power of two, as the OCP's formats round it. Not searched: the next loses a bit of every weight, the one before
    cuts the largest."""

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The power of two."""
        return (e8m0(params["scale"]) * unit).float()

    def lines(self, params: Params, unit: float) -> Lines:
        """As a bfloat16, which has the same exponents."""
        return Lines(self.load(params, unit).bfloat16())

    def spanning(self, largest: Float32[Tensor, "rows groups"], levels: Levels, search: bool) -> Params:
        """The power of two of the largest weight, rounded up beyond the format's threshold."""
        threshold = levels.round_up_threshold if isinstance(levels, FloatLevels) else 2.0
        reach = torch.tensor(levels.reach * levels.unit)
        exponent = torch.frexp(largest * (2 / threshold)).exponent - torch.frexp(reach).exponent
        return {"scale": (exponent + 127).clamp(0, 254).to(torch.uint8)}

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest powers of two, by ratio."""
        return {"scale": (torch.log2(scale).round() + 127).clamp(0, 254).to(torch.uint8)}

    def tried(self, plain: Params) -> list[Params]:
        """Nothing: a power of two is not searched."""
        return []

    def near(self, params: Params) -> list[Params]:
        """The power before, and the one after."""
        return [{"scale": (params["scale"].int() + t).clamp(0, 254).to(torch.uint8)} for t in STEPS]


@dataclass(frozen=True)
class UnderGlobal(Searched):
    """An E4M3 number, and one number of the matrix by which all are divided, or (`factor`) multiplied: NVFP4."""

    factor: bool = False
    """As Model Optimizer's files have it: one is no exact inverse of the other. It is read and never fitted."""
    tries: tuple[int, ...] = (0, -2, -1, 1, 2, 3, 4, 5, 6)
    """As of `Byte`."""

    @property
    def shared(self) -> frozenset[str]:
        """The divisor, or the factor."""
        return frozenset({"factor" if self.factor else "divisor"})

    def bits(self, count: int) -> float:
        """8 for each, and 32 for the divisor."""
        return 8.0 * count + 32

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The E4M3 number over the divisor, or times the factor."""
        return self.combined(params, self.numbers(params), unit)

    def numbers(self, params: Params) -> Params:
        """The E4M3 number: what a matrix shares stays, since engines have several matrices share it."""
        return {"scale": E4M3.value(params["scale"])}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The number over the divisor, or times the factor."""
        scale = numbers["scale"] * params["factor"] if self.factor else numbers["scale"] / params["divisor"]
        return scale if unit == 1 else scale * unit

    def nearest(self, params: Params, numbers: Params) -> Params:
        """The nearest E4M3 number that is not zero."""
        return {**params, "scale": E4M3.nearest(numbers["scale"].clamp(min=2.0**-9))}

    def lines(self, params: Params, unit: float) -> Lines | None:
        """The E4M3 numbers, if none is negative: such are read without a sign."""
        above = params["factor"] if self.factor else params["divisor"].double().reciprocal()
        if above.numel() != 1 or (params["scale"] > 0x7E).any():
            return None
        return Lines(params["scale"].view(torch.float8_e4m3fn), unit=unit * above.item())

    def spanning(self, largest: Float32[Tensor, "rows groups"], levels: Levels, search: bool) -> Params:
        """The E4M3 number nearest to min-max; after a search, under the divisor that most matrices share."""
        most = E4M3.top * levels.reach * levels.unit
        if search:
            return self.under(largest, _shared_divisor(largest.max(), most), levels, search)
        divisor = (most / largest.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=2.0**100)
        return self.under(largest, divisor, levels, search)

    def under(
        self, largest: Float32[Tensor, "rows groups"], divisor: Tensor, levels: Levels = E2M1, search: bool = False
    ) -> Params:
        """The parameters below a divisor that is known, as engines find them for activations."""
        byte = E4M3.nearest(divisor * (largest / (levels.reach * levels.unit)))
        scale = byte.clamp(min=1) if search else torch.where(byte == 0, 0x20, byte).to(torch.uint8)
        return {"scale": scale, "divisor": divisor.view(1, 1)}

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest E4M3 numbers below the same divisor."""
        return {"scale": E4M3.nearest((scale * params["divisor"]).contiguous()).clamp(1, 126)}

    def tried(self, plain: Params) -> list[Params]:
        """Bytes near the plain one."""
        return [{**plain, **moved} for moved in self._moved(plain, self.tries)]

    def near(self, params: Params) -> list[Params]:
        """Bytes near these, under the divisor that there is."""
        return self._moved(params, STEPS)

    def _moved(self, params: Params, steps: tuple[int, ...]) -> list[Params]:
        return [{"scale": (params["scale"].int() + t).clamp(1, 126).to(torch.uint8)} for t in steps]


@dataclass(frozen=True)
class UnderHalf(Storage):
    """6 bits: an integer from -32 to 31 times the fp16 number of SUPER in-features."""

    first: Number
    """What scales are before they are made integers."""
    group: int

    def bits(self, count: int) -> float:
        """6 for each, and 16 for the fp16 number above."""
        return (6 + 16 * self.group / SUPER) * count

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The integer times the fp16 number."""
        return self.combined(params, self.numbers(params), unit)

    def numbers(self, params: Params) -> Params:
        """The fp16 number, and the integers."""
        return {"d": params["d"].float(), "scale": params["scale"].float() - 32}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The integer times the fp16 number."""
        d = numbers["d"]
        return (d[..., None] * numbers["scale"].unflatten(1, (d.shape[1], -1))).flatten(1) * unit

    def nearest(self, params: Params, numbers: Params) -> Params:
        """Both rounded."""
        scale = numbers["scale"].round().clamp(-32, 31) + 32
        return {"d": numbers["d"].clamp(-65504, 65504).half(), "scale": scale.to(torch.uint8)}

    def near(self, params: Params) -> list[Params]:
        """Integers near these."""
        return [{"scale": (params["scale"].int() + t).clamp(0, 63).to(torch.uint8)} for t in STEPS]

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest integers below the same fp16 numbers."""
        each = params["d"].float().repeat_interleave(scale.shape[1] // params["d"].shape[1], 1)
        return {"scale": ((scale * inverse(each)).round().clamp(-32, 31) + 32).to(torch.uint8)}

    def lines(self, params: Params, unit: float) -> Lines:
        """The integers, with their sign."""
        return Lines((params["scale"].to(torch.int16) - 32).to(torch.int8), params["d"], unit)


@dataclass(frozen=True)
class Nested(Storage):
    """bitsandbytes': an index of `dynamic_map`, times an fp32 number for NESTED of them, plus the mean of all."""

    first: Number
    """What scales are before they are made indices."""

    def bits(self, count: int) -> float:
        """8 for each, 32 for each NESTED of them, and 32 for their mean."""
        return 8.0 * count + 32 * -(-count // NESTED) + 32

    @property
    def shared(self) -> frozenset[str]:
        """All of them: numbers of scales belong to no row."""
        return frozenset({"scale", "nested", "offset"})

    def load(self, params: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """The value of the index times its fp32 number, plus the mean."""
        return self.combined(params, self.numbers(params), unit)

    def numbers(self, params: Params) -> Params:
        """What the index stands for."""
        code = params["scale"]
        return {"scale": dynamic_map().to(code.device)[code.int()]}

    def combined(self, params: Params, numbers: Params, unit: float = 1.0) -> Float32[Tensor, "rows groups"]:
        """What the index stands for times its fp32 number, plus the mean."""
        value = numbers["scale"].flatten()
        each = params["nested"].repeat_interleave(NESTED)[: len(value)]
        scale = value * each + params["offset"]
        return (scale if unit == 1 else scale * unit).view(params["scale"].shape)

    def nearest(self, params: Params, numbers: Params) -> Params:
        """The nearest index."""
        return {**params, "scale": _nearest_in_map(numbers["scale"])}

    def stored(self, scale: Float32[Tensor, "rows groups"], params: Params) -> Params:
        """The nearest indices below the same numbers."""
        each = params["nested"].repeat_interleave(NESTED)[: scale.numel()]
        return {"scale": _nearest_in_map((scale.flatten() - params["offset"]) * inverse(each)).view(scale.shape)}

    def nest(self, scale: Float32[Tensor, "rows groups"]) -> Params:
        """Scales less their mean, as indices of `dynamic_map` with a scale for each NESTED; and the mean."""
        flat = scale.flatten()
        offset = flat.mean()
        x = functional.pad(flat - offset, (0, -flat.numel() % NESTED)).view(-1, NESTED)
        nested = x.abs().amax(1)
        code = _nearest_in_map(x * inverse(nested)[:, None])
        return {
            "scale": code.flatten()[: len(flat)].view(scale.shape),
            "nested": nested,
            "offset": offset.view(1),
        }


AnyStorage = Searched | UnderHalf | Nested


@dataclass(frozen=True)
class Scales:
    """Granularity and storage."""

    granularity: int | str
    """Weights per group; or "channel" (the whole row), "tensor", or "block" (SIDE x SIDE)."""
    storage: AnyStorage
    flat: bool = False
    """Whether groups follow one another through the matrix: where they do not divide a row, some belong to two, and the
    last may be cut short."""

    @property
    def group_size(self) -> int | None:
        """In-features that share parameters; None: the whole row or more, or other ones in each row."""
        if self.granularity == "block":
            return SIDE
        return self.granularity if isinstance(self.granularity, int) and not self.flat else None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[rows of scales, scales in each] of a matrix."""
        out, width = shape
        if self.flat and isinstance(self.granularity, int):
            blocks = -(-out * width // self.granularity)
            return (out, blocks // out) if width % self.granularity == 0 else (1, blocks)
        rows = {"tensor": 1, "block": -(-out // SIDE)}.get(str(self.granularity), out)
        return rows, -(-width // self.group_size) if self.group_size else 1

    def grouped(self, x: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows groups size"]:
        """Weights by group; what is missing in the last is zeros."""
        out, width = x.shape
        rows, groups = self.shape((out, width))
        if self.granularity == "block":
            x = functional.pad(x, (0, groups * SIDE - width, 0, rows * SIDE - out))
            return x.view(rows, SIDE, groups, SIDE).transpose(1, 2).reshape(rows, groups, SIDE * SIDE)
        if self.flat and isinstance(self.granularity, int):
            x = functional.pad(x.reshape(-1), (0, -x.numel() % self.granularity))
        return x.reshape(rows, groups, -1)

    def ungrouped(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `grouped`."""
        out, width = shape
        if self.granularity == "block":
            rows, groups, _ = x.shape
            x = x.view(rows, groups, SIDE, SIDE).transpose(1, 2).reshape(rows * SIDE, groups * SIDE)
            return x[:out, :width].contiguous()
        return x.reshape(-1)[: out * width].view(out, width)

    def per_row(self, scale: Tensor, out: int, width: int) -> tuple[Tensor, int | None]:
        """A row of scales for every row of weights, and how many in-features share one; None: all do."""
        if self.flat and isinstance(self.granularity, int):
            if scale.shape[0] == out:
                return scale, self.granularity
            return scale.flatten().repeat_interleave(self.granularity)[: out * width].view(out, width), 1
        if self.granularity == "block":
            return scale.repeat_interleave(SIDE, 0)[:out], SIDE
        return scale.expand(out, -1), self.group_size


def _number(name: str, dtype: torch.dtype, tries: tuple[float, ...] = PHASES) -> Number:
    """A number of a dtype, with the limits that keep it neither zero nor infinite."""
    if dtype.itemsize == 2:
        return Number(name, dtype, SMALLEST, LARGEST, tries)
    return Number(name, dtype, torch.finfo(dtype).tiny, torch.finfo(dtype).max, tries)


FP16, BF16, FP32 = (
    _number(name, dtype) for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
)
NUMBERS: dict[str, Number] = {number.kind: number for number in (FP16, BF16, FP32)}
"""Scales as the files of a Hugging Face folder have them."""


def pairs(scales: list[Params], offsets: list[Params]) -> list[Params]:
    """Each scale, each offset, and each scale with each offset."""
    return [*scales, *offsets, *({**scale, **offset} for scale in scales for offset in offsets)]


def e8m0(byte: Integer[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """The powers of two that bytes stand for: 255 is beyond float32."""
    return torch.exp2(byte.double() - 127)


@lru_cache
def dynamic_map() -> Float32[Tensor, "256"]:
    """Seven decades with 1, 2, 4, ... 64 values of either sign, each the middle of an equal part of its decade; 0 and 1
    (8-Bit Optimizers, Dettmers et al., 2110.02861)."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (ends[:-1] + ends[1:]) / 2
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def _nearest_in_map(value: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The index in `dynamic_map` of what is nearest."""
    table = dynamic_map().to(value.device)
    return torch.bucketize(value.contiguous(), (table[:-1] + table[1:]) / 2).to(torch.uint8)


def _shared_divisor(largest: Float32[Tensor, ""], most: float) -> Float32[Tensor, ""]:
    """The same for nearly every matrix, since engines that fuse several take one divisor for all: DIVISOR, or a power
    of it for matrices far from the usual size."""
    steps = torch.floor(torch.log2(most / largest.clamp(1e-30, 1e30)) / 10)
    return torch.where(largest > 0, DIVISOR**steps, DIVISOR)
