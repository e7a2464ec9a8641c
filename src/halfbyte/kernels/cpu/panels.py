"""Products with packed weights on CPUs: which vector code suits a processor and a form of panels, and calling it."""

import ctypes
import struct
from functools import cache
from types import NotImplementedType
from typing import Literal

import torch
from jaxtyping import Float
from llvmlite import ir
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.cpu import native
from halfbyte.kernels.cpu.emit import ADDRESSES, EMITTERS, FIELDS, Target
from halfbyte.kernels.cpu.vectors import BF16, F16, F32
from halfbyte.kernels.levels import Even, Levels, Table, values_of
from halfbyte.kernels.panels import CHUNK, ROWS, SUPER, Activations, Form, Panels

OUT = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
MANY = {"float32": 16, "bfloat16": 16, "int8": 48}
"""Tokens from which decoding the weights and a product of torch's is faster."""
DECODED_ROWS = 512
"""Decoded at once: they stay in the second-level cache until they are multiplied by."""
FEW_BYTES = 1 << 18
"""Of a thread's share. To wake one that waits passively takes as long as to read so many: with 1 << 15, two threads
answered 21 tokens of SmolLM2 in a second, one thread 32."""
Arithmetic = Literal["float32", "bfloat16", "int8"]
Context = ctypes.c_int64 * len(FIELDS)
BASIC = {"avx2", "fma", "f16c"}
WIDE = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


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
        self.workers = _workers(form, how, dtype, here)
        self.rows = self.panels * ROWS
        self.no_bias = torch.zeros(self.rows)
        at = {name: tensor.data_ptr() for name, tensor in panels.tensors.items()}
        unit = struct.unpack("<I", struct.pack("<f", panels.unit * _float_unit(form.levels)))[0]
        self.lines = [at.get(name, 0) for name in ADDRESSES[:6]]
        self.counts = [self.chunks, -(-panels.group // CHUNK), self.groups, supers, unit]

    def product(self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "tokens out"]:
        """Of a few tokens, with the codes as they are."""
        (tokens, width), (prepare, multiply, _) = x.shape, self.workers
        x_read = (x if self.how == "bfloat16" else x.float()).contiguous()
        if width != self.width:
            x_read = functional.pad(x_read, (0, self.width - width))
        y = torch.empty(tokens, self.rows, dtype=self.dtype)
        steps, rounded = (tokens * self.chunks, tokens * self.width) if self.how == "int8" else (0, 0)
        scratch = (ctypes.c_char * (4 * (tokens * self.sums + steps) + rounded))()
        sums = ctypes.addressof(scratch)
        rounding = sums + 4 * tokens * self.sums
        beginning = self.no_bias if bias is None else functional.pad(bias.float(), (0, self.rows - self.shape[0]))
        context = Context(
            *self.lines,
            x_read.data_ptr(),
            rounding + 4 * steps,
            rounding,
            sums,
            beginning.data_ptr(),
            y.data_ptr(),
            *self.counts,
            self.panels,
            0,
            tokens,
            self.rows * self.dtype.itemsize,
        )
        if prepare is not None:
            prepare(context, 1)
        multiply(context, _threads(self.size))
        return y if self.rows == self.shape[0] else y[:, : self.shape[0]]

    def product_of_many(
        self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """Weights are decoded to the type of x, some rows at a time."""
        out, width = self.shape
        y = torch.empty(len(x), out, dtype=self.dtype)
        values = torch.empty(self.width, DECODED_ROWS, dtype=self.dtype)
        for first in range(0, out, DECODED_ROWS):
            rows = min(DECODED_ROWS, out - first)
            panels = -(-rows // ROWS)
            written = DECODED_ROWS * values.itemsize
            context = Context(
                *self.lines, *(0,) * 5, values.data_ptr(), *self.counts, panels, first // ROWS, 0, written
            )
            self.workers[2](context, _threads(panels * ROWS * width))
            torch.mm(x, values[:width, :rows], out=y[:, first : first + rows])
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


def _threads(size: int) -> int:
    return min(torch.get_num_threads(), size // FEW_BYTES) if size >= 2 * FEW_BYTES else 1


@cache
def _workers(
    form: Form, how: Arithmetic, dtype: torch.dtype, here: Target
) -> tuple[native.Worker | None, native.Worker, native.Worker]:
    """prepare (None where there is nothing to prepare), product, decode."""
    emitter = EMITTERS[how](form, here, OUT[dtype])

    def emit() -> ir.Module:
        module = ir.Module("panels")
        emitter.emit_prepare(module)
        emitter.emit_product(module)
        emitter.emit_decode(module)
        return module

    made = native.workers(f"{form}|{how}|{dtype}|{here}", emit, ("prepare", "product", "decode"))
    return made["prepare"] if emitter.prepares else None, made["product"], made["decode"]
