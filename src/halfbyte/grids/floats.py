"""Small floating-point numbers times a scale: FP8, the microscaling formats, NVFP4.

    fp8-e4m3-tensor     one scale per matrix
    fp8-e4m3-channel    one scale per out-feature (row)
    fp8-e4m3-block      one scale per 128 x 128 weights, as DeepSeek's checkpoints have it
    mxfp8-e4m3          a power of two (E8M0) per 32 in-features (OCP Microscaling Formats 1.0); mxfp6-e2m3 and others likewise
    nvfp4-global        E2M1, an E4M3 scale per 16 in-features, and one divisor for the scales of a matrix (compressed-tensors' NVFP4)

The scales of FP8 are stored in fp32 unless the name ends in `-bf16` or `-fp16`. Codes are the file's: sign, exponent, mantissa, the
sign in the highest bit. Rounding is to nearest, ties to even, and never beyond the largest number.

A float is about as precise wherever it lies, so what a search can win is the phase: scales that are not an octave apart put the
largest weights, whose errors are most of the error, nearer to a level or further from one. For the levels that each candidate chooses
the best scale has a closed form (see rounding.py); the candidate that loses least wins.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Float32, Float64, Integer, UInt8
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import BadRequest
from halfbyte.grids import rounding
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape
from halfbyte.grids.scalar import SCALE_DTYPES

PATTERN = re.compile(r"fp8-(?P<element>e4m3|e5m2)-(?P<span>tensor|channel|block)(-(?P<scale>fp32|bf16|fp16))?")
SIDE = 128
"""Rows, and in-features, of a block."""
EXPONENT = 0x7F800000
PHASES = 4
"""Scales tried in an octave."""
BYTES_TRIED = (0, -2, -1, 1, 2, 3, 4, 5, 6)
"""By how much the E4M3 scales to try differ, as bytes, from the one that spans the largest weight."""
NVFP4_NAMES = {"e4m3": "nvfp4-global", "e4m3-factor": "nvfp4-factor"}
DIVISOR = 1024.0
"""Of the scales of NVFP4: theirs are then normal numbers for groups whose largest weight is anything from 0.0001 to 2.6."""


@dataclass(frozen=True)
class Element:
    """A floating-point format of few bits, with subnormal numbers."""

    name: str
    exponent: int
    mantissa: int
    """Bits of each; the bias is 2^(exponent - 1) - 1."""
    top: float
    """The largest number."""
    carry: float
    """Weights of 2^k times this and more get the power-of-two scale of those from 2^(k+1) on (compressed-tensors mxfp_utils.py)."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def low(self) -> int:
        """The exponent field, as float32 has it in its bits, of the smallest normal number."""
        return (127 - (1 << (self.exponent - 1)) + 2) << 23

    def round(self, x: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Added to a number whose last bit is what a step is there, a number is rounded to steps by the addition."""
        size = x.abs().clamp(max=self.top)
        exponent = (size.view(torch.int32) & EXPONENT).clamp(min=self.low)
        magic = exponent + ((23 - self.mantissa) << 23)
        steps = (size + magic.view(torch.float32)).view(torch.int32) - magic
        code = ((exponent - self.low) >> (23 - self.mantissa)) + steps
        return (code + (x.signbit().int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """In float32; NaN for the codes beyond the largest number."""
        return values(self).to(codes.device)[codes.int()]


ELEMENTS = {
    "e4m3": Element("e4m3", 4, 3, 448.0, 1.75),
    "e5m2": Element("e5m2", 5, 2, 57344.0, 1.75),
    "e2m3": Element("e2m3", 2, 3, 7.5, 1.9375),
    "e3m2": Element("e3m2", 3, 2, 28.0, 1.75),
    "e2m1": Element("e2m1", 2, 1, 6.0, 1.75),
}


@lru_cache
def values(element: Element) -> Float32[Tensor, " codes"]:
    """The number that each code stands for; NaN for the codes beyond the largest."""
    code = torch.arange(1 << (element.bits - 1), dtype=torch.float64)
    exponent, mantissa = code // (1 << element.mantissa), code % (1 << element.mantissa)
    steps = torch.where(exponent == 0, mantissa, mantissa + (1 << element.mantissa))
    size = steps * torch.exp2(exponent.clamp(min=1) + 2 - (1 << (element.exponent - 1)) - 1 - element.mantissa)
    size = torch.where(size > element.top, torch.nan, size).float()
    return torch.cat([size, -size])


def e8m0(byte: Integer[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """The powers of two that bytes stand for: 255 is beyond float32."""
    return torch.exp2(byte.double() - 127)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Elements times scales; `granularity` says how many weights share one."""

    element: Element
    granularity: int | str
    """In-features per group, or "block" (SIDE x SIDE), "channel" (the whole row) or "tensor"."""
    scale: str = "fp32"
    """How scales are stored: a key of SCALE_DTYPES, "e8m0", "e4m3" under a divisor, or "e4m3-factor" under a factor."""

    vector_size = 1
    pattern = PATTERN

    @classmethod
    def parse(cls, name: str) -> "FloatGrid":
        match = PATTERN.fullmatch(name)
        if match is None:
            raise BadRequest(f"'{name}' is no FP8 grid; write fp8-<e4m3|e5m2>-<tensor|channel|block>")
        return cls(ELEMENTS[match["element"]], match["span"], match["scale"] or "fp32")

    def __str__(self) -> str:
        if self.scale == "e8m0":
            return f"mxfp{self.element.bits}-{self.element.name}"
        if self.scale in NVFP4_NAMES:
            return NVFP4_NAMES[self.scale]
        return f"fp8-{self.element.name}-{self.granularity}{'' if self.scale == 'fp32' else '-' + self.scale}"

    def with_scale(self, scale: str) -> "FloatGrid":
        return replace(self, scale=scale)

    @property
    def shares_params_across_rows(self) -> bool:
        return self.granularity == "tensor" or self.scale in NVFP4_NAMES

    @property
    def group_size(self) -> int | None:
        return SIDE if self.granularity == "block" else self.granularity if isinstance(self.granularity, int) else None

    def scales_shape(self, shape: Shape) -> Shape:
        """[rows of scales, scales in each]."""
        out, width = shape
        if isinstance(self.granularity, int) and width % self.granularity:
            raise BadRequest(f"{self} does not divide a row of {width}; it takes multiples of {self.granularity}")
        rows = {"tensor": 1, "block": -(-out // SIDE)}.get(str(self.granularity), out)
        return rows, -(-width // self.group_size) if self.group_size else 1

    def bits(self, shape: Shape) -> float:
        rows, groups = self.scales_shape(shape)
        size = SCALE_DTYPES[self.scale].itemsize * 8 if self.scale in SCALE_DTYPES else 8
        return self.element.bits + (rows * groups * size + (32 if self.scale in NVFP4_NAMES else 0)) / (
            shape[0] * shape[1]
        )

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """`scale` as `scales_shape` says: in its dtype, or as the stored byte. E4M3: also fp32 `divisor` [1, 1]."""
        self.scales_shape(tuple(w.shape))
        largest = self._over_rows(self._largest(w), torch.amax)
        plain = self._plain(largest, search)
        if (
            not search or self.scale == "e8m0"
        ):  # the next power of two loses a bit of every weight, the one before cuts the largest
            return plain
        tried = self._tried(plain["scale"])
        scales = torch.stack([self.scales({**plain, "scale": t}) for t in tried], -1)
        wq, qq = (
            self._over_rows(m, torch.sum) for m in self._moments(w, importance, self._per_row(scales, w.shape[0]))
        )
        stored = torch.stack(tried, -1)
        if self.scale in SCALE_DTYPES:
            stored = rounding.store(torch.where(qq > 0, wq / qq, scales), SCALE_DTYPES[self.scale])
            scales = stored.float()
        best = (scales * (2 * wq - scales * qq)).argmax(-1, keepdim=True)
        return {**plain, "scale": stored.gather(-1, best).squeeze(-1)}

    def _plain(self, largest: Float32[Tensor, "rows groups"], search: bool) -> Params:
        """Scales that span the largest weights: those of compressed-tensors, but for a divisor that suits a search."""
        if self.scale in SCALE_DTYPES:
            return {
                "scale": rounding.store(
                    torch.where(largest == 0, 1.0, largest / self.element.top), SCALE_DTYPES[self.scale]
                )
            }
        if self.scale == "e8m0":
            exponent = (
                torch.frexp(largest * (2 / self.element.carry)).exponent
                - torch.frexp(torch.tensor(self.element.top)).exponent
            )
            return {"scale": (exponent + 127).clamp(0, 254).to(torch.uint8)}
        most = ELEMENTS["e4m3"].top * self.element.top
        divisor = (
            _shared_divisor(largest.max(), most)
            if search
            else (most / largest.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=2.0**100)
        )
        return self._under(largest, divisor, search)

    def under(self, x: Float[Tensor, "rows in"], divisor: Float32[Tensor, "1"]) -> Params:
        """NVFP4's parameters below a divisor that is known, as engines find them for inputs."""
        return self._under(self._largest(x), divisor, search=False)

    def _under(self, largest: Float32[Tensor, "rows groups"], divisor: Tensor, search: bool) -> Params:
        byte = ELEMENTS["e4m3"].round(divisor * (largest / self.element.top))
        return {
            "scale": byte.clamp(min=1) if search else torch.where(byte == 0, 0x20, byte).to(torch.uint8),
            "divisor": divisor.view(1, 1),
        }

    def _tried(self, plain: Tensor) -> list[Tensor]:
        if self.scale in SCALE_DTYPES:
            return [rounding.store(plain.float() * 2 ** (k / PHASES), plain.dtype) for k in range(PHASES)]
        return [(plain.int() + t).clamp(1, 126).to(torch.uint8) for t in BYTES_TRIED]

    def scales(self, params: Params) -> Float32[Tensor, "rows groups"]:
        """What elements are multiplied by."""
        scale = params["scale"]
        if self.scale == "e8m0":
            return e8m0(scale).float()
        if self.scale == "e4m3":
            return ELEMENTS["e4m3"].decode(scale) / params["divisor"]
        if self.scale == "e4m3-factor":
            return ELEMENTS["e4m3"].decode(scale) * params["factor"]
        return scale.float()

    def _per_row(self, scales: Tensor, out: int) -> Tensor:
        """[out, groups, ...]: a row of scales for every row of weights."""
        if self.granularity == "block":
            return scales.repeat_interleave(SIDE, 0)[:out]
        return scales.expand(out, *scales.shape[1:])

    def _over_rows(self, x: Tensor, reduce) -> Tensor:
        """The inverse: what is known of every row's groups, to that of the weights which share a scale."""
        if self.granularity == "tensor":
            return reduce(x, 0, keepdim=True)
        if self.granularity == "block":
            return reduce(
                functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % SIDE)).unflatten(0, (-1, SIDE)), 1
            )
        return x

    def _grouped(self, x: Float[Tensor, "rows in"]) -> Float32[Tensor, "rows groups size"]:
        """The groups of each row, the last filled up with zeros."""
        size = self.group_size or x.shape[1]
        return functional.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))

    def _largest(self, w: Float[Tensor, "out in"]) -> Float32[Tensor, "out groups"]:
        if w.device.type == "cpu":
            from halfbyte.grids import floats_numba

            return floats_numba.largest(w, self.group_size or w.shape[1])
        return self._grouped(w).abs().amax(-1)

    def _moments(
        self,
        w: Float[Tensor, "out in"],
        importance: Float32[Tensor, "... in"] | None,
        scales: Float32[Tensor, "out groups tries"],
    ) -> tuple[Float32[Tensor, "out groups tries"], Float32[Tensor, "out groups tries"]]:
        """sum(h w q) and sum(h q q) over each group, for the elements q that each scale chooses."""
        if w.device.type == "cpu":
            from halfbyte.grids import floats_numba

            return floats_numba.moments(self.element, w, importance, scales, self.group_size or w.shape[1])
        return self.moments_reference(w, importance, scales)

    def moments_reference(
        self,
        w: Float[Tensor, "out in"],
        importance: Float32[Tensor, "... in"] | None,
        scales: Float32[Tensor, "out groups tries"],
    ) -> tuple[Float32[Tensor, "out groups tries"], Float32[Tensor, "out groups tries"]]:
        """The torch reference of `_moments`."""
        x = self._grouped(w)
        h = self._grouped(
            torch.ones(1, w.shape[1], device=w.device) if importance is None else importance.view(-1, w.shape[1])
        )
        sums = []
        for scale in scales.unbind(-1):
            q = self.element.decode(self.element.round(x * scale.reciprocal()[..., None]))
            sums.append(((h * x * q).sum(-1), (h * q * q).sum(-1)))
        wq, qq = zip(*sums, strict=True)
        return torch.stack(wq, -1), torch.stack(qq, -1)

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        group = at // self.group_size if self.group_size else 0
        scale = self._per_row(self.scales(params)[:, group : group + 1], w.shape[0])
        code = self.element.round(w / scale)
        return code, self.element.decode(code) * scale

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids.floats_numba import bits_of
        from halfbyte.grids.round_block_numba import Floats, round_block

        return partial(
            round_block, Floats(self._per_row(self.scales(params), rows), *bits_of(self.element)), self.group_size
        )

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        scales = self._per_row(self.scales(params), w.shape[0])
        if w.device.type == "cpu":
            from halfbyte.grids import floats_numba

            return floats_numba.encode(self.element, w, scales, self.group_size or w.shape[1])
        return self.encode_reference(w, scales)

    def encode_reference(self, w: Float[Tensor, "out in"], scales: Float32[Tensor, "out groups"]) -> Codes:
        """The torch reference of `encode`."""
        return self.element.round(self._grouped(w) / scales[..., None]).flatten(1)[:, : w.shape[1]].contiguous()

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        scales = self._per_row(self.scales(params), codes.shape[0])
        if codes.device.type == "cpu":
            from halfbyte.grids import floats_numba

            return floats_numba.decode(self.element, codes, scales, self.group_size or codes.shape[1])
        return self.decode_reference(codes, scales)

    def decode_reference(self, codes: Codes, scales: Float32[Tensor, "out groups"]) -> Float32[Tensor, "out in"]:
        """The torch reference of `decode`."""
        return (
            self.element.decode(codes)
            * scales.repeat_interleave(self.group_size or codes.shape[1], 1)[:, : codes.shape[1]]
        )


def _shared_divisor(largest: Float32[Tensor, ""], most: float) -> Float32[Tensor, ""]:
    """The same for nearly every matrix, since engines that fuse several take one divisor for all: DIVISOR, or a power of it for
    matrices far from the usual size."""
    steps = torch.floor(torch.log2(most / largest.clamp(1e-30, 1e30)) / 10)
    return torch.where(largest > 0, DIVISOR**steps, DIVISOR)


FLOAT_GRIDS: dict[str, FloatGrid] = {
    **{
        f"fp8-{e}-{span}": FloatGrid(ELEMENTS[e], span)
        for e in ("e4m3", "e5m2")
        for span in ("tensor", "channel", "block")
    },
    **{f"mxfp{ELEMENTS[e].bits}-{e}": FloatGrid(ELEMENTS[e], 32, "e8m0") for e in ("e4m3", "e5m2", "e2m3", "e3m2")},
    "nvfp4-global": FloatGrid(ELEMENTS["e2m1"], 16, "e4m3"),
}

NVFP4_FACTOR = FloatGrid(ELEMENTS["e2m1"], 16, "e4m3-factor")
"""nvfp4-global with a factor in place of the divisor, as Model Optimizer's files have it: one is no exact inverse of the other.
It is read and never fitted, so it is not in the table."""
