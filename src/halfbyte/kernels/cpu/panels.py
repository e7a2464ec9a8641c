"""Products with packed weights on CPUs: which vector code suits a processor and a form of panels, and calling it."""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from types import NotImplementedType
from typing import Literal

import torch
from jaxtyping import Float, Float32
from llvmlite import ir
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.cpu import native, pages
from halfbyte.kernels.cpu.emit import ADDRESSES, EMITTERS, FIELDS, Target
from halfbyte.kernels.cpu.team import share_out
from halfbyte.kernels.cpu.vectors import BF16, F16, F32
from halfbyte.kernels.levels import Even, Levels, Table, values_of
from halfbyte.kernels.panels import CHUNK, ROWS, SUPER, Activations, Form, Panels

OUT = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
MANY = {"float32": 16, "bfloat16": 16, "int8": 48}
"""Tokens from which decoding the weights and a product of torch's is faster."""
DECODED_BYTES = 8 << 20
"""Of values that are decoded at once: 512 tokens and a matrix of 4096 x 4096 take 14.6 ms, with a half of it 23.4."""
PIECE_BYTES = 1 << 15
"""Of codes that a thread takes at a time."""
FEW_BYTES = 1 << 19
"""Of a matrix, for which no thread that sleeps is woken: that takes as long as to read so many."""
_ROOMS: list[Tensor] = []
"""For decoded values, kept from one call to the next: a process that asks the system for as much each time waits for
as long as it decodes. Whoever has one has taken it out."""
DECODED_PANELS = 16
"""That a thread decodes at a time: their values lie side by side, and two threads that write into one line of a cache
wait for one another."""
Arithmetic = Literal["float32", "bfloat16", "int8"]
X, BIAS, OUTPUT = (FIELDS.index(name) for name in ("x", "bias", "out"))
BASIC = {"avx2", "fma", "f16c"}
WIDE = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


class Context(ctypes.c_int64 * len(FIELDS)):
    """What a kernel is given, and the room that it has."""

    room: ctypes.Array


@cache
def target() -> Target | None:
    """What this processor can do; None where that is too little."""
    here = native.features()
    if not here >= BASIC:
        return None
    wide = here >= WIDE
    dots = "vnni512" if wide and "avx512vnni" in here else "vnni256" if "avxvnni" in here else "avx2"
    return Target(dots, bfloat16=wide and "avx512bf16" in here, permutes=wide)


def arithmetic(levels: Levels, dtype: torch.dtype, activations: Activations, target: Target) -> Arithmetic:
    """How products with these levels are taken."""
    if activations == "int8" and _are_bytes(levels, target):
        return "int8"
    is_exact = isinstance(levels, Even) or (isinstance(levels, Table) and _is_exact(levels, torch.bfloat16))
    return "bfloat16" if dtype == torch.bfloat16 and target.bfloat16 and is_exact else "float32"


def _are_bytes(levels: Levels, target: Target) -> bool:
    """Without VNNI two products of bytes are added up in 16 bits: codes of 7 bits, no more."""
    if isinstance(levels, Even):
        return levels.bits < 8 or target.dots != "avx2"
    return target.dots != "avx2" and isinstance(levels, Table) and _is_exact(levels, torch.int8)


def _is_exact(levels: Table, dtype: torch.dtype) -> bool:
    return torch.equal(values_of(levels).to(dtype).float(), values_of(levels))


def worth_making(_: Tensor) -> bool:
    """Whether this processor has AVX2."""
    return target() is not None


def stacked(_: Tensor, parts: Sequence[Panels]) -> Panels:
    """In large pages."""
    return parts[0].as_one_of(parts, pages.joined([part.tensors for part in parts]))


def product(
    x: Float[Tensor, "tokens in"], panels: Panels, bias: Float[Tensor, " out"] | None, activations: Activations
) -> Float[Tensor, "tokens out"] | NotImplementedType:
    """As `kernels.panels.product`; NotImplemented on processors without AVX2."""
    key = x.dtype, activations
    prepared = panels.kept.get(key)
    if prepared is None or prepared.codes != panels.tensors["codes"].data_ptr():
        here = target()
        if here is None or x.dtype not in OUT:
            return NotImplemented
        how = arithmetic(panels.form.levels, x.dtype, activations, here)
        prepared = panels.kept[key] = Prepared(panels, how, x.dtype, here)
    if "order" in panels.tensors:
        x = x[:, panels.tensors["order"]]
    return prepared.product(x, bias) if x.shape[0] < MANY[prepared.how] else prepared.product_of_many(x, bias)


class Prepared:
    """A matrix, to be multiplied in one way: all that a call need not find out anew."""

    def __init__(self, panels: Panels, how: Arithmetic, dtype: torch.dtype, here: Target):
        _require_whole(panels)
        form, self.shape, self.codes = panels.form, panels.shape, panels.tensors["codes"].data_ptr()
        self.how: Arithmetic = how
        self.dtype = dtype
        self.width, self.chunks, self.panels = panels.chunks * CHUNK, panels.chunks, panels.panels
        self.groups, supers = _groups(panels)
        self.sums = self.groups * supers
        self.size = panels.tensors["codes"].numel()
        self.pieces = max(1, min(self.size // PIECE_BYTES, self.panels))
        self.workers = _workers(form, how, dtype, here)
        self.rows = self.panels * ROWS
        self.bias: tuple[Tensor | None, Float32[Tensor, " rows"]] = None, torch.zeros(self.rows)
        at = {name: tensor.data_ptr() for name, tensor in panels.tensors.items()}
        unit = struct.unpack("<I", struct.pack("<f", panels.unit * _float_unit(form.levels)))[0]
        self.lines = [at.get(name, 0) for name in ADDRESSES[:6]]
        self.counts = [self.chunks, -(-panels.group // CHUNK), self.groups, supers, unit]
        self.ready: dict[int, Context] = {}

    def product(self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "tokens out"]:
        """Of a few tokens, with the codes as they are.

        Between two products gigabytes of weights go through the caches, and all that a call touches comes from memory:
        what can be is found once and kept, and is nobody else's while a call has it.
        """
        tokens, width = x.shape
        if self.how == "float32":
            x = x.float()
        if width != self.width:
            x = functional.pad(x, (0, self.width - width))
        if not x.is_contiguous():
            x = x.contiguous()
        of, values = self.bias
        if bias is not of:
            values = self._take(bias)
        y = torch.empty(tokens, self.rows, dtype=self.dtype)
        context = self.ready.pop(tokens, None) or self._context(tokens)
        context[X], context[BIAS], context[OUTPUT] = x.data_ptr(), values.data_ptr(), y.data_ptr()
        prepare, multiply, _ = self.workers
        share_out(prepare, multiply, context, self.pieces, self.size > FEW_BYTES)
        self.ready[tokens] = context
        return y if self.rows == self.shape[0] else y[:, : self.shape[0]]

    def _context(self, tokens: int) -> Context:
        """With room for what is prepared of so many tokens."""
        steps, rounded = (tokens * self.chunks, tokens * self.width) if self.how == "int8" else (0, 0)
        room = (ctypes.c_char * (4 * (tokens * self.sums + steps) + rounded))()
        sums = ctypes.addressof(room)
        rounding = sums + 4 * tokens * self.sums
        prepared = [rounding + 4 * steps, rounding, sums]
        row_bytes = self.rows * self.dtype.itemsize
        context = Context(*self.lines, 0, *prepared, 0, 0, *self.counts, self.panels, 0, tokens, row_bytes)
        context.room = room
        return context

    def _take(self, bias: Float[Tensor, " out"] | None) -> Float32[Tensor, " rows"]:
        """The bias of all rows of all panels."""
        values = torch.zeros(self.rows)
        if bias is not None:
            values[: len(bias)] = bias
        self.bias = bias, values
        return values

    def product_of_many(
        self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """Weights are decoded to the type of x, some rows at a time."""
        (out, width), (_, _, decode) = self.shape, self.workers
        y = torch.empty(len(x), out, dtype=self.dtype)
        most = max(DECODED_BYTES // (self.width * self.dtype.itemsize) // ROWS, 1) * ROWS
        room = _ROOMS.pop() if _ROOMS else torch.empty(0, dtype=torch.uint8)
        if len(room) < self.width * most * self.dtype.itemsize:
            room = torch.empty(self.width * most * self.dtype.itemsize, dtype=torch.uint8)
        values = room.view(self.dtype)[: self.width * most].view(self.width, most)
        for first in range(0, out, most):
            rows = min(most, out - first)
            panels = -(-rows // ROWS)
            written = most * values.itemsize
            context = Context(
                *self.lines, *(0,) * 5, values.data_ptr(), *self.counts, panels, first // ROWS, 0, written
            )
            share_out(0, decode, context, max(1, panels // DECODED_PANELS))
            torch.mm(x, values[:width, :rows], out=y[:, first : first + rows])
        _ROOMS.append(room)
        return y if bias is None else y.add_(bias)


def _require_whole(panels: Panels) -> None:
    """Raise ValueError for tensors of other sizes than kernels read: addresses are all that these are given."""
    groups, supers = _groups(panels)
    per_group, per_super, codes = groups * supers * ROWS, supers * ROWS, panels.chunks * panels.form.chunk_bytes
    sizes = {
        "scale": per_group,
        "zero": per_group,
        "offset": per_group,
        "d": per_super,
        "dmin": per_super,
        "codes": codes,
    }
    for name, size in sizes.items():
        tensor = panels.tensors.get(name)
        if tensor is not None and (tensor.numel() != size * panels.panels or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} of {panels.form}: {tuple(tensor.shape)} for {panels.shape} in groups of {panels.group}"
            )


def _groups(panels: Panels) -> tuple[int, int]:
    """Groups of 256 in-features and how many of those; or of the row, once."""
    if panels.form.is_under:
        return SUPER // panels.group, panels.shape[1] // SUPER
    if panels.form.is_half:
        return 2 * panels.chunks, 1
    return -(-panels.shape[1] // panels.group), 1


def _float_unit(levels: Levels) -> float:
    """What small floats lack whose bits are read as those of a float of 16 bits."""
    if isinstance(levels, Even | Table):
        return 1.0
    return 2.0 ** (15 - ((1 << (levels.exponent - 1)) - 1))


@cache
def _workers(form: Form, how: Arithmetic, dtype: torch.dtype, here: Target) -> tuple[int, int, int]:
    """Where prepare (0 where there is nothing to prepare), product and decode are."""
    emitter = EMITTERS[how](form, here, OUT[dtype])

    def emit() -> ir.Module:
        module = ir.Module("panels")
        emitter.emit_prepare(module)
        emitter.emit_product(module)
        emitter.emit_decode(module)
        return module

    made = native.compiled(f"{form}|{how}|{dtype}|{here}", emit, ("prepare", "product", "decode"))
    return made["prepare"] if emitter.prepares else 0, made["product"], made["decode"]
