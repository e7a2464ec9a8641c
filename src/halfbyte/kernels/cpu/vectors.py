"""LLVM's vector instructions from Python: what kernels for packed weights are written in.

Numba leaves it to LLVM to find vectors in loops, and finds none of the instructions that add up products of bytes or of
bfloat16. Here every value is a vector of 16 lanes; where a processor's registers hold fewer, LLVM takes several.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

Value = Any
"""Of llvmlite, whose annotations know of no attributes."""
LANES = 16
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
I8, F16, F32 = ir.IntType(8), ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()
BYTES = {I8: 1, I16: 2, F16: 2, BF16: 2, I32: 4, F32: 4, I64: 8}


def vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Of so many lanes."""
    return ir.VectorType(kind, lanes)


class Vectors:
    """A builder of vector code."""

    def __init__(self, builder: ir.IRBuilder):
        self.b = builder

    def constant(self, value: float, kind: ir.Type = I32, lanes: int = LANES) -> ir.Constant:
        """The same in all lanes."""
        return ir.Constant(vector(kind, lanes), [value] * lanes)

    def index(self, value: int) -> ir.Constant:
        """A number of bytes, or of steps."""
        return ir.Constant(I64, value)

    def at(self, pointer: Value, *offsets: Value | int) -> Value:
        """So many bytes further on."""
        for offset in offsets:
            if not (isinstance(offset, int) and offset == 0):
                offset = self.index(offset) if isinstance(offset, int) else offset
                pointer = self.b.gep(pointer, [offset], source_etype=I8)
        return pointer

    def times(self, *factors: Value | int) -> Value:
        """A product of numbers of bytes or steps."""
        values = [self.index(factor) if isinstance(factor, int) else factor for factor in factors]
        product = values[0]
        for factor in values[1:]:
            product = self.b.mul(product, factor)
        return product

    def load(self, pointer: Value, kind: ir.Type, lanes: int = LANES) -> Value:
        """A vector that lies anywhere."""
        return self.b.load(pointer, typ=vector(kind, lanes), align=BYTES[kind])

    def number(self, pointer: Value, kind: ir.Type) -> Value:
        """One number."""
        return self.b.load(pointer, typ=kind, align=BYTES[kind])

    def splat(self, value: Value, lanes: int = LANES) -> Value:
        """One number in all lanes."""
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(vector(I32, lanes), [0] * lanes))

    def loaded_splat(self, pointer: Value, kind: ir.Type) -> Value:
        """One number of memory in all lanes."""
        return self.splat(self.number(pointer, kind))

    def call(self, name: str, returned: ir.Type, *args: Value) -> Value:
        """An intrinsic, or a symbol that the process has."""
        module = self.b.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(returned, [arg.type for arg in args]), name=name
        )
        return self.b.call(function, args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once."""
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def prefetch(self, pointer: Value) -> None:
        """What will be read soon, if it is anywhere: into all caches."""
        read, keep, data = (ir.Constant(I32, number) for number in (0, 2, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)

    def halves(self, value: Value) -> tuple[Value, Value]:
        """The lower and the upper lanes."""
        half = value.type.count // 2
        pick = [ir.Constant(vector(I32, half), list(range(first, first + half))) for first in (0, half)]
        return self.b.shuffle_vector(value, value, pick[0]), self.b.shuffle_vector(value, value, pick[1])

    def joined(self, low: Value, high: Value) -> Value:
        """The inverse of `halves`."""
        lanes = ir.Constant(vector(I32, 2 * low.type.count), list(range(2 * low.type.count)))
        return self.b.shuffle_vector(low, high, lanes)

    def loop(
        self,
        first: Value | int,
        last: Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
        step: int = 1,
    ) -> list[Value]:
        """for i in range(first, last, step): carried = body(i, carried), as long as i + step <= last. `carried` ends
        with the first i that was not done."""
        b, before = self.b, self.b.block
        first = self.index(first) if isinstance(first, int) else first
        head, inside, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i, values = b.phi(I64), [b.phi(value.type) for value in carried]
        for phi, value in zip([i, *values], [first, *carried], strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_unsigned("<=", b.add(i, self.index(step)), last), inside, after)
        b.position_at_end(inside)
        new = body(i, list(values))
        following = b.add(i, self.index(step))
        for phi, value in zip([i, *values], [following, *new], strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return [*values, i]
