"""Weights as kernels multiply by them: panels of 16 rows side by side, in the bits that their codes have.

A panel holds chunks of 32 in-features. Of each chunk a row has a word of 32 bits for each bit of a code: planes of 4, 2
and 1 bits (a code of 5 bits has one of 4 and one of 1), each as `kernels.planes` packs it with a stride of 4, and the
words of the 16 rows lie together. So every register holds the same in-features of 16 rows, one activation meets all of
its lanes, and no sum is ever taken across a register. In each four in-features the middle two change places: the even
bytes of a word are neighbours then, and so are the odd ones, which is how products of two bfloat16 want them.

    weight = (level(code) - zero) * scale * d * unit + offset * dmin * unit

One scale for `group` in-features, one `d` for 256. What is not there is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from halfbyte.formats import Activations
from halfbyte.kernels import planes
from halfbyte.kernels.choose import faster
from halfbyte.kernels.levels import Even, Levels, table_of, values_of
from halfbyte.kernels.levels import Float as FloatLevels

ROWS, CHUNK, SUPER = 16, 32, 256
"""Rows of a panel; in-features of a chunk; in-features that share a `d`."""
STRIDE = 4
"""In-features whose codes are the bytes of a word."""
ORDER = (0, 2, 1, 3)
"""Which in-feature of four each byte of a word is of."""


class Operands(NamedTuple):
    """A matrix as levels and lines, whatever its grid: what panels are made of."""

    codes: UInt8[Tensor, "out in"]
    levels: Levels
    group: int
    """In-features that share a scale: the whole row or fewer."""
    scale: Shaped[Tensor, "out groups"]
    """Of 16 or 32 bits, an E4M3 number without a sign, or an integer of 8 bits."""
    zero: UInt8[Tensor, "out groups"] | None = None
    """Codes that stand for zero, where groups have their own."""
    middle: float = 0.0
    """The code that stands for zero in all of them."""
    offset: Shaped[Tensor, "out groups"] | None = None
    """What a group begins with: fp16, or an integer times `dmin`."""
    is_split: bool = False
    """Whether the upper four bits of `scale` are the offset."""
    d: Float[Tensor, "out supers"] | None = None
    dmin: Float[Tensor, "out supers"] | None = None
    """fp16 numbers that integer scales and offsets are multiplied by; `dmin` with its sign."""
    unit: float = 1.0
    """What all of it is multiplied by."""
    order: Int64[Tensor, " in"] | None = None
    """Which in-feature each column is of, if they are sorted."""


@dataclass(frozen=True)
class Form:
    """All that a kernel is compiled for."""

    levels: Levels
    scale: torch.dtype
    middle: float
    has_zero: bool
    offset: torch.dtype | None
    is_under: bool
    """Whether scales are multiplied by a `d`."""
    has_dmin: bool
    """Whether offsets are multiplied by a `dmin`."""
    is_half: bool
    """Whether groups are half a chunk."""
    is_split: bool
    """Whether a byte is a scale of four bits and an offset of four."""

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane of codes, the lowest first."""
        bits = self.levels.bits
        return (8,) if bits == 8 else tuple(plane for plane in (4, 2, 1) if bits & plane)

    @property
    def chunk_bytes(self) -> int:
        """Of the codes of a chunk, in a panel."""
        return sum(self.planes) * ROWS * CHUNK // 8


@dataclass(frozen=True, eq=False)
class Panels:
    """A matrix in panels. Its tensors stay where they are: kernels keep their addresses."""

    form: Form
    shape: tuple[int, int]
    group: int
    unit: float
    tensors: dict[str, Tensor]
    """`codes` uint8, flat; of each panel and group (or 256 in-features), 16 of: `scale`, `zero`, `offset`, `d`, `dmin`;
    and `order`, of in-features."""
    kept: dict[object, Any] = field(default_factory=dict, repr=False)
    """What kernels know of it from one call to the next."""

    @property
    def chunks(self) -> int:
        """Along a row."""
        return -(-self.shape[1] // CHUNK)

    @property
    def panels(self) -> int:
        """Down the matrix."""
        return -(-self.shape[0] // ROWS)

    @property
    def row_bytes(self) -> float:
        """That a row takes, be it one of the matrix or one that fills up a panel."""
        lines = (tensor for name, tensor in self.tensors.items() if name != "order")
        return sum(tensor.numel() * tensor.itemsize for tensor in lines) / (self.panels * ROWS)

    @property
    def kind(self) -> object:
        """What is the same of matrices that can be stacked; of others, their own."""
        if self.shape[0] % ROWS or "order" in self.tensors:
            return id(self)
        return self.form, self.shape[1], self.group, self.unit

    def as_one_of(self, parts: "Sequence[Panels]", tensors: dict[str, Tensor]) -> "Panels":
        """All of these, whose tensors are now these."""
        return replace(self, shape=(sum(part.shape[0] for part in parts), self.shape[1]), tensors=tensors, kept={})

    def split(self, rows: Sequence[int]) -> "list[Panels]":
        """The inverse of `stacked`: the same memory."""
        if len(rows) == 1:
            return [self]
        sizes = {
            name: [len(tensor) * count // self.shape[0] for count in rows] for name, tensor in self.tensors.items()
        }
        tensors = {name: tensor.split(sizes[name]) for name, tensor in self.tensors.items()}
        return [
            replace(self, shape=(count, self.shape[1]), tensors={name: t[k] for name, t in tensors.items()}, kept={})
            for k, count in enumerate(rows)
        ]

    def holding(self, tensors: dict[str, Tensor]) -> "Panels":
        """The same of other tensors: moved ones."""
        return replace(self, tensors=tensors, kept={})

    def __getstate__(self) -> dict[str, Any]:
        """Copies lie elsewhere."""
        return vars(self) | {"kept": {}}

    def rows(self, rows: Int64[Tensor, " rows"]) -> Float32[Tensor, "rows in"]:
        """Some rows, decoded."""
        panel, lane = rows // ROWS, rows % ROWS
        codes = self.tensors["codes"].view(self.panels, self.chunks, -1, ROWS, STRIDE)[panel, ..., lane, :]
        lines = {
            name: value.view(self.panels, -1, ROWS)[panel, :, lane]
            for name, value in self.tensors.items()
            if name not in ("codes", "order")
        }
        return self._values(_codes(self.form, codes), lines)

    def decode(self) -> Float32[Tensor, "out in"]:
        """All rows."""
        return self.rows(torch.arange(self.shape[0], device=self.tensors["codes"].device))

    def _values(self, codes: UInt8[Tensor, "rows in"], lines: dict[str, Tensor]) -> Float32[Tensor, "rows in"]:
        form, width = self.form, self.shape[1]

        if form.is_split:
            lines = lines | {"scale": lines["scale"] & 15, "offset": lines["scale"] >> 4}

        def each(name: str) -> Float32[Tensor, "rows in"]:
            size = SUPER if name in ("d", "dmin") else self.group
            return lines[name].float().repeat_interleave(size, 1)[:, :width]

        if isinstance(form.levels, Even):
            values = codes[:, :width].float() - (each("zero") if form.has_zero else form.middle)
        else:
            values = values_of(form.levels).to(codes.device)[codes[:, :width].int()]
        values = values * (each("scale") * each("d") if form.is_under else each("scale"))
        if "offset" in lines:
            values = values + (each("offset") * each("dmin") if form.has_dmin else each("offset"))
        values = values * self.unit
        return values[:, self.tensors["order"].argsort()] if "order" in self.tensors else values


def pack(operands: Operands) -> Panels | None:
    """The matrix in panels; None where its groups are none that kernels go through."""
    codes, (out, width) = operands.codes, operands.codes.shape
    group = width if operands.group >= width else operands.group
    levels, unit = operands.levels, operands.unit
    if isinstance(levels, Even):
        levels = Even(levels.bits)
    elif isinstance(levels, FloatLevels) and levels.bits == 4:  # a table is a register
        levels = table_of(levels, levels.top)
        unit *= levels.unit
    if not (group == width or group == CHUNK // 2 or group % CHUNK == 0):
        return None
    if operands.d is not None and width % SUPER:
        return None
    form = Form(
        levels=levels,
        scale=operands.scale.dtype,
        middle=float(operands.middle),
        has_zero=operands.zero is not None,
        offset=None if operands.offset is None else operands.offset.dtype,
        is_under=operands.d is not None,
        has_dmin=operands.dmin is not None,
        is_split=operands.is_split,
        is_half=group == CHUNK // 2 and group < width,
    )
    lines = {name: getattr(operands, name) for name in ("scale", "zero", "offset", "d", "dmin")}
    if form.is_half and operands.scale.shape[1] % 2:
        lines = {name: value if value is None else functional.pad(value, (0, 1)) for name, value in lines.items()}
    if width % CHUNK or out % ROWS:
        codes = functional.pad(codes, (0, -width % CHUNK, 0, -out % ROWS))
    tensors = {"codes": packed_codes(codes, form.planes)}
    tensors |= {name: _paneled(value, out) for name, value in lines.items() if value is not None}
    if operands.order is not None:
        tensors["order"] = operands.order
    return Panels(form, (out, width), group, unit, tensors)


@faster(cpu="panel_codes")
def packed_codes(codes: UInt8[Tensor, "out in"], planes_bits: tuple[int, ...]) -> UInt8[Tensor, " bytes"]:
    """Codes of whole panels and chunks, in planes."""
    out, width = codes.shape
    words = codes.view(out // ROWS, ROWS, width // CHUNK, -1, STRIDE)[..., list(ORDER)]
    chunks = words.permute(0, 2, 3, 1, 4).reshape(-1, ROWS * CHUNK)
    packed, shift = [], 0
    for bits in planes_bits:
        packed.append(chunks if bits == 8 else planes.pack(chunks, bits, shift, ROWS * STRIDE))
        shift += bits
    return torch.cat(packed, 1).flatten()


def _codes(form: Form, raw: UInt8[Tensor, "rows chunks words 4"]) -> UInt8[Tensor, "rows in"]:
    """Of each word of some rows."""
    codes = torch.zeros(raw.shape[0] * raw.shape[1], CHUNK, dtype=torch.uint8, device=raw.device)
    shift = 0
    for bits, plane in zip(form.planes, raw.split(list(form.planes), 2), strict=True):
        plane = plane.reshape(len(codes), -1)
        if bits == 8:
            codes = plane
        else:
            planes.unpack(plane, codes, bits, shift, STRIDE)
        shift += bits
    # The order is its own inverse.
    return codes.view(-1, STRIDE)[:, list(ORDER)].reshape(raw.shape[0], -1)


def _paneled(value: Shaped[Tensor, "out groups"], out: int) -> Shaped[Tensor, " numbers"]:
    """Numbers of groups, those of 16 rows side by side."""
    value = value.expand(out, -1)
    padded = torch.cat([value, value[-1:].expand(-out % ROWS, -1)])
    return padded.view(-1, ROWS, value.shape[1]).transpose(1, 2).flatten()


@faster(cpu="panels", gpu="panels")
def worth_making(like: Tensor) -> bool:
    """Whether something multiplies by panels faster than by decoding them, where a tensor lies."""
    return False


@faster(cpu="panels")
def stacked(_: Tensor, parts: Sequence[Panels]) -> Panels:
    """One matrix of several of one kind, whose first codes these are: a panel's numbers lie together, so panels follow
    one another. It lies where products read it fastest."""
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return parts[0].as_one_of(parts, tensors)


@faster(cpu="panels", gpu="panels")
def product(
    x: Float[Tensor, "tokens in"], panels: Panels, bias: Float[Tensor, " out"] | None, activations: Activations
) -> Float[Tensor, "tokens out"]:
    """x W^T + bias, in the type of x. The reference: decode, and multiply."""
    return functional.linear(x, panels.decode().to(x.dtype), bias)
