"""Products of activations with panels, and panels decoded, as vector code.

A worker goes through its share of the panels, and for each through the tokens, a few at a time. Of a group it adds up
level(code) * activation and then multiplies by the scale: (sum - zero * sum of the activations) * scale. What codes are
offset by so that they need no subtraction (the bits of a bfloat16 of 128, with those of a code, are 128 + code) goes
the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from llvmlite import ir

from halfbyte.kernels.cpu.vectors import (
    BF16,
    BYTES,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    Value,
    Vectors,
    vector,
)
from halfbyte.kernels.levels import Even, Float, Table, values_of
from halfbyte.kernels.panels import CHUNK, ORDER, ROWS, STRIDE, Form

TILES = (4, 1)
"""Tokens at a time."""
QUADS = CHUNK // STRIDE
"""Words of a chunk whose bytes are codes of four in-features."""
ADDRESSES = ("codes", "scale", "zero", "offset", "d", "dmin", "x", "rounded", "rounding", "sums", "bias", "out")
COUNTS = ("chunks", "group_chunks", "groups", "supers", "unit", "panels", "first", "tokens", "out_bytes")
"""Chunks of a row and of a group; groups of 256 in-features (or of the row) and how many of those; the bits of a
float32; panels and the first of them; bytes from one row of `out` to the next."""
FIELDS = (*ADDRESSES, *COUNTS)
"""Of a context, 8 bytes each."""
AHEAD = 4096
"""Bytes of codes ahead of those that are multiplied: without, one thread reads 7.6 of 11.7 GB/s; with 4096, 10.7."""
ONE = 0x43004300
"""Two bfloat16 of 128: adding a code of 7 bits to the bits adds it to the number."""
LINES = {
    torch.float32: F32,
    torch.float16: F16,
    torch.bfloat16: BF16,
    torch.float8_e4m3fn: I8,
    torch.uint8: I8,
    torch.int8: I8,
}
FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
HALF_UNIT = 2.0**8
"""What the bits of an E4M3 number, read as those of a float of 16 bits, stand for too little."""


@dataclass(frozen=True)
class Target:
    """What vector code is written for."""

    dots: str
    """How four products of bytes are added up: "vnni512", "vnni256" or "avx2"."""
    bfloat16: bool
    """AVX512_BF16: sums of products of two bfloat16."""
    permutes: bool
    """AVX-512: tables of 16 float32, or of 32 numbers of 16 bits, in a register."""


class Context:
    """What a worker is given, in the function that reads it."""

    def __init__(self, e: Vectors, pointer: Value):
        self._e, self._pointer = e, pointer

    def __getitem__(self, name: str) -> Value:
        kind = POINTER if name in ADDRESSES else I64
        return self._e.b.load(self._e.at(self._pointer, 8 * FIELDS.index(name)), typ=kind, align=8)

    @property
    def unit(self) -> Value:
        """What all is multiplied by, in all lanes."""
        return self._e.loaded_splat(self._e.at(self._pointer, 8 * FIELDS.index("unit")), F32)


@dataclass(frozen=True)
class Lines:
    """What one group's codes are multiplied by and offset by, in float32, a row in each lane."""

    scale: Value
    zero: Value | None
    offset: Value | None


class Emitter:
    """Of one form of panels: products in float32."""

    activation_bytes = 4

    def __init__(self, form: Form, target: Target, out: ir.Type):
        self.form, self.target, self.out = form, target, out

    # --- codes

    def quads(self, e: Vectors, chunk: Value) -> list[Value]:
        """The codes of a chunk: of each four in-features, the bytes of a word in every row's lane."""
        words: dict[int, Value] = {}
        quads = []
        for quad in range(QUADS):
            first, shift, codes = 0, 0, None
            for bits in self.form.planes:
                word, place = first + quad * bits // 8, quad % (8 // bits) * bits
                if word not in words:
                    words[word] = e.load(e.at(chunk, word * ROWS * 4), I32)
                    e.prefetch(e.at(chunk, word * ROWS * 4 + AHEAD))
                part = moved(e, words[word], shift - place)
                if bits < 8:
                    part = e.b.and_(part, e.constant(((1 << bits) - 1 << shift) * 0x01010101))
                codes = part if codes is None else e.b.or_(codes, part)
                first, shift = first + bits, shift + bits
            quads.append(codes)
        return quads

    def value(self, e: Vectors, code: Value) -> Value:
        """What a code stands for, in float32; of evenly spaced levels, the code itself, or less the middle."""
        levels = self.form.levels
        if isinstance(levels, Even):
            code = e.b.sub(code, e.constant(int(self.form.middle))) if self.is_centred else code
            return e.b.sitofp(code, vector(F32))
        if isinstance(levels, Float):  # its bits are those of a float of 16 bits, but for where exponents begin
            sign = moved(e, e.b.and_(code, e.constant(1 << (levels.bits - 1))), 16 - levels.bits)
            size = e.b.and_(code, e.constant((1 << (levels.bits - 1)) - 1))
            half = e.b.trunc(e.b.or_(sign, moved(e, size, 10 - levels.mantissa)), vector(I16))
            return e.b.fpext(e.b.bitcast(half, vector(F16)), vector(F32))
        table = _sixteen(values_of(levels).tolist())
        if self.target.permutes:
            return e.call("llvm.x86.avx512.permvar.sf.512", vector(F32), ir.Constant(vector(F32), table), code)
        low, high = (self._permuted(e, table[half : half + 8], code) for half in (0, 8))
        return e.b.select(e.b.icmp_unsigned(">=", code, e.constant(8)), high, low)

    def values(self, e: Vectors, quad: Value) -> Iterator[tuple[int, Value]]:
        """Of each of four in-features: its number, and what its codes stand for."""
        for byte, feature in enumerate(ORDER):
            yield feature, self.value(e, e.b.and_(moved(e, quad, -8 * byte), e.constant(0xFF)))

    @staticmethod
    def _permuted(e: Vectors, table: list[float], code: Value) -> Value:
        """By three bits of each code, from eight values."""
        kind = vector(F32, 8)
        name = "llvm.x86.avx2.permps"
        return e.joined(*(e.call(name, kind, ir.Constant(kind, table), part) for part in e.halves(code)))

    # --- sums of one group

    @property
    def is_centred(self) -> bool:
        """Whether the middle is taken off each code. Of many levels it is so large that sums with it lose bits: of 8
        bits, a product was wrong by 2e-6 of the largest."""
        return self.form.middle >= 32

    @property
    def begins(self) -> float:
        """The code of zero, as products have it."""
        return self.form.middle if isinstance(self.form.levels, Even) and not self.is_centred else 0.0

    @property
    def needs_sums(self) -> bool:
        """Whether sums of activations are asked for."""
        return self.begins != 0 or self.form.has_zero or self.form.offset is not None or self.form.is_split

    @property
    def prepares(self) -> bool:
        """Whether anything is to be known of activations before they are multiplied."""
        return self.needs_sums

    def chains(self, tokens: int) -> int:
        """Sums of each token: one addition need not wait for the one before."""
        return max(1, 4 // tokens)

    def fresh(self, tokens: int) -> list[Value]:
        """Sums of nothing, those of each token side by side."""
        return [ir.Constant(vector(F32), None)] * (tokens * self.chains(tokens))

    def add(
        self,
        e: Vectors,
        sums: list[Value],
        quads: Sequence[Value],
        x: Sequence[Value],
        steps: Sequence[Value],
    ) -> list[Value]:
        """Products of the in-features of some quads, with those of each token at `x`; where activations are rounded,
        those of a chunk are multiplied by the number at `steps`."""
        sums, chains = list(sums), self.chains(len(x))
        for number, quad in enumerate(quads):
            for byte, (feature, value) in enumerate(self.values(e, quad)):
                for token, pointer in enumerate(x):
                    k = token * chains + byte % chains
                    read = e.loaded_splat(e.at(pointer, 4 * (STRIDE * number + feature)), F32)
                    sums[k] = e.fma(value, read, sums[k])
        return sums

    def total(self, e: Vectors, sums: list[Value], token: int, tokens: int) -> Value:
        """All sums of a token."""
        chains = self.chains(tokens)
        return folded(e.b.fadd, sums[token * chains : (token + 1) * chains])

    # --- lines

    def lines(self, e: Vectors, c: Context, group: Value, above: Sequence[Value | None]) -> Lines:
        """Of one group of the panel; `above`: the fp16 numbers, if there are any."""

        def read(name: str, kind: torch.dtype) -> Value:
            return as_float(e, e.load(e.at(c[name], e.times(group, ROWS * kind.itemsize)), LINES[kind]), kind)

        (d, dmin), offset = above, None
        if self.form.is_split:
            byte = e.b.zext(e.load(e.at(c["scale"], e.times(group, ROWS)), I8), vector(I32))
            scale = e.b.sitofp(e.b.and_(byte, e.constant(15)), vector(F32))
            offset = e.b.sitofp(moved(e, byte, -4), vector(F32))
        else:
            scale = read("scale", self.form.scale)
            offset = read("offset", self.form.offset) if self.form.offset is not None else None
        if offset is not None and dmin is not None:
            offset = e.b.fmul(offset, dmin)
        return Lines(
            scale if d is None else e.b.fmul(scale, d),
            read("zero", torch.uint8) if self.form.has_zero else None,
            offset,
        )

    def above(self, e: Vectors, c: Context, place: Value) -> list[Value | None]:
        """`d` and `dmin` of 256 in-features of a panel, if there are any."""
        form, place = self.form, e.times(place, ROWS * 2)
        names = (("d", form.is_under), ("dmin", form.has_dmin))
        return [as_float(e, e.load(e.at(c[name], place), F16), torch.float16) if here else None for name, here in names]

    def each_group(
        self,
        e: Vectors,
        c: Context,
        panel: Value,
        carried: Sequence[Value],
        body: Callable[[Value, Sequence[Value | None], list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """body(group of all panels, numbers above, carried), group after group of a panel; of groups that are half a
        chunk, every second."""
        form, supers, groups = self.form, c["supers"], c["groups"]

        def of_super(number: Value, values: list[Value]) -> list[Value]:
            place = e.b.add(e.times(panel, supers), number)
            first, above = e.times(place, groups), self.above(e, c, place)
            each = lambda group, inner: body(e.b.add(first, group), above, inner)  # noqa: E731
            return e.loop(0, groups, values, each, 2 if form.is_half else 1)[:-1]

        return e.loop(0, supers, carried, of_super)[:-1]

    # --- functions

    def emit_tile(self, module: ir.Module, tokens: int) -> ir.Function:
        """tile(context, panel, token): some tokens times one panel."""
        function, e = started(module, f"tile{tokens}", [POINTER, I64, I64])
        c, panel, token = Context(e, function.args[0]), *function.args[1:]
        chunks, name = c["chunks"], "rounded" if self.activation_bytes == 1 else "x"
        row_bytes = e.times(chunks, CHUNK * self.activation_bytes)
        x = [e.at(c[name], e.times(e.b.add(token, e.index(t)), row_bytes)) for t in range(tokens)]
        all_groups = e.times(c["groups"], c["supers"])
        codes = e.at(c["codes"], e.times(panel, chunks, self.form.chunk_bytes))

        def group(number: Value, above: Sequence[Value | None], results: list[Value]) -> list[Value]:
            own = e.b.sub(number, e.times(panel, all_groups))
            for part, sums in enumerate(self._sums(e, c, own, codes, x, token)):
                lines = self.lines(e, c, e.b.add(number, e.index(part)), above)
                for t in range(tokens):
                    place = e.times(e.b.add(e.times(e.b.add(token, e.index(t)), all_groups), own), 4)
                    total = self.total(e, sums, t, tokens)
                    if self.needs_sums:
                        activations = e.loaded_splat(e.at(c["sums"], place, 4 * part), F32)
                        total = e.fma(e.constant(-self.begins, F32), activations, total) if self.begins else total
                        if lines.zero is not None:
                            total = e.fma(e.b.fneg(lines.zero), activations, total)
                        if lines.offset is not None:
                            results[t] = e.fma(lines.offset, activations, results[t])
                    results[t] = e.fma(lines.scale, total, results[t])
            return results

        results = self.each_group(e, c, panel, [ir.Constant(vector(F32), None)] * tokens, group)
        bias = e.load(e.at(c["bias"], e.times(panel, ROWS * 4)), F32)
        for t, result in enumerate(results):
            place = e.b.add(e.times(e.b.add(token, e.index(t)), c["out_bytes"]), e.times(panel, ROWS * BYTES[self.out]))
            self._store(e, e.fma(result, c.unit, bias), e.at(c["out"], place))
        e.b.ret_void()
        return function

    def _sums(
        self, e: Vectors, c: Context, group: Value, codes: Value, x: list[Value], token: Value
    ) -> list[list[Value]]:
        """Sums of a group, or of the two that share a chunk."""

        def chunk(number: Value, sums: list[list[Value]]) -> list[list[Value]]:
            quads = self.quads(e, e.at(codes, e.times(number, self.form.chunk_bytes)))
            here = [e.at(pointer, e.times(number, CHUNK * self.activation_bytes)) for pointer in x]
            steps = [
                e.at(c["rounding"], e.times(e.b.add(e.times(e.b.add(token, e.index(t)), c["chunks"]), number), 4))
                for t in range(len(x))
            ]
            size = QUADS // len(sums)
            return [
                self.add(
                    e,
                    part,
                    quads[size * k : size * (k + 1)],
                    [e.at(pointer, size * k * STRIDE * self.activation_bytes) for pointer in here],
                    steps,
                )
                for k, part in enumerate(sums)
            ]

        fresh = self.fresh(len(x))
        if self.form.is_half:
            return chunk(e.b.udiv(group, e.index(2)), [fresh, fresh])
        first = e.times(group, c["group_chunks"])
        last = smaller(e, e.b.add(first, c["group_chunks"]), c["chunks"])
        return [e.loop(first, last, fresh, lambda number, sums: chunk(number, [sums])[0])[:-1]]

    def _store(self, e: Vectors, value: Value, pointer: Value) -> None:
        rounded = value if self.out == F32 else e.b.fptrunc(value, vector(self.out))
        e.b.store(rounded, pointer, align=BYTES[self.out])

    def emit_product(self, module: ir.Module) -> None:
        """product(context, thread, threads)."""
        tiles = {tokens: self.emit_tile(module, tokens) for tokens in TILES}
        function, e = started(module, "product", [POINTER, I64, I64])
        c = Context(e, function.args[0])

        def panel(number: Value, _: list[Value]) -> list[Value]:
            token: Value | int = 0
            for tokens, tile in tiles.items():
                call = partial(self._call, e, tile, function.args[0], number)
                token = e.loop(token, c["tokens"], [], call, tokens)[-1]
            return []

        e.loop(*share(e, c["panels"], *function.args[1:]), [], panel)
        e.b.ret_void()

    @staticmethod
    def _call(e: Vectors, tile: ir.Function, context: Value, panel: Value, token: Value, _: list[Value]) -> list[Value]:
        e.b.call(tile, [context, panel, token])
        return []

    def emit_prepare(self, module: ir.Module) -> None:
        """prepare(context, thread, threads): sums of the activations of each group, by one thread."""
        function, e = started(module, "prepare", [POINTER, I64, I64])
        c = Context(e, function.args[0])
        groups = e.times(c["groups"], c["supers"])
        vectors = e.times(c["chunks"], CHUNK // LANES)
        size = e.index(1) if self.form.is_half else e.times(c["group_chunks"], CHUNK // LANES)

        def token(number: Value, _: list[Value]) -> list[Value]:
            self._round(e, c, number)

            def group(own: Value, _: list[Value]) -> list[Value]:
                first = e.times(own, size)
                last = smaller(e, e.b.add(first, size), vectors)
                add = lambda k, sums: [e.b.fadd(sums[0], self._activations(e, c, number, k))]  # noqa: E731
                sums = e.loop(first, last, [ir.Constant(vector(F32), None)], add)
                place = e.times(e.b.add(e.times(number, groups), own), 4)
                e.b.store(across(e, e.b.fadd, sums[0]), e.at(c["sums"], place), align=4)
                return []

            if self.needs_sums:
                e.loop(0, groups, [], group)
            return []

        e.loop(0, c["tokens"], [], token)
        e.b.ret_void()

    def _round(self, e: Vectors, c: Context, token: Value) -> None:
        """Activations as products take them, if not as they are."""

    def _activations(self, e: Vectors, c: Context, token: Value, number: Value) -> Value:
        """16 of a token, in float32."""
        place = e.b.add(e.times(token, c["chunks"], CHUNK), e.times(number, LANES))
        return e.load(e.at(c["x"], e.times(place, 4)), F32)

    def emit_decode(self, module: ir.Module) -> None:
        """decode(context, thread, threads): values of some panels, those of a row one below the other. Chunk after
        chunk, of all panels: what is written lies together."""
        function, e = started(module, "decode", [POINTER, I64, I64])
        c = Context(e, function.args[0])
        chunks, groups, supers = c["chunks"], c["groups"], c["supers"]
        panels = share(e, c["panels"], *function.args[1:])

        def of_chunk(chunk: Value, _: list[Value]) -> list[Value]:
            own = e.times(chunk, 2) if self.form.is_half else e.b.udiv(chunk, c["group_chunks"])
            own_super = e.b.udiv(own, groups)

            def of_panel(number: Value, _: list[Value]) -> list[Value]:
                panel = e.b.add(c["first"], number)
                above = self.above(e, c, e.b.add(e.times(panel, supers), own_super))
                group = e.b.add(e.times(panel, supers, groups), own)
                lines = [
                    self._line(e, self.lines(e, c, e.b.add(group, e.index(k)), above), c)
                    for k in range(2 if self.form.is_half else 1)
                ]
                codes = e.at(c["codes"], e.times(e.b.add(e.times(panel, chunks), chunk), self.form.chunk_bytes))
                first = e.b.add(e.times(chunk, CHUNK, c["out_bytes"]), e.times(number, ROWS * BYTES[self.out]))
                self._decode_chunk(e, c, codes, lines, e.at(c["out"], first))
                return []

            e.loop(*panels, [], of_panel)
            return []

        e.loop(0, chunks, [], of_chunk)
        e.b.ret_void()

    def _line(self, e: Vectors, lines: Lines, c: Context) -> tuple[Value, Value]:
        """value = code * slope + start."""
        slope, start = e.b.fmul(lines.scale, c.unit), ir.Constant(vector(F32), None)
        if lines.offset is not None:
            start = e.b.fmul(lines.offset, c.unit)
        zero = lines.zero
        if isinstance(self.form.levels, Even) and zero is None and not self.is_centred:
            zero = e.constant(self.form.middle, F32)
        return slope, start if zero is None else e.fma(e.b.fneg(zero), slope, start)

    def _decode_chunk(self, e: Vectors, c: Context, codes: Value, lines: Sequence[tuple], out: Value) -> None:
        for number, quad in enumerate(self.quads(e, codes)):
            slope, start = lines[number * len(lines) // QUADS]
            for feature, value in self.values(e, quad):
                place = e.at(out, e.times(c["out_bytes"], STRIDE * number + feature))
                self._store(e, e.fma(value, slope, start), place)


class BFloat16Emitter(Emitter):
    """Products of bfloat16 activations with codes as bfloat16, both exact; sums in float32."""

    activation_bytes = 2

    @property
    def parts(self) -> int:
        """Codes of 8 bits are two of 4: a bfloat16 has room for 7."""
        return 2 if isinstance(self.form.levels, Even) and self.form.levels.bits == 8 else 1

    @property
    def begins(self) -> float:
        """With the 128 that codes are added to."""
        if not isinstance(self.form.levels, Even):
            return 0.0
        return self.form.middle + (128 if self.parts == 1 else 128 + 16 * 128)

    def chains(self, tokens: int) -> int:
        """Of each part, at least one."""
        return max(self.parts, 4 // tokens)

    def add(
        self,
        e: Vectors,
        sums: list[Value],
        quads: Sequence[Value],
        x: Sequence[Value],
        steps: Sequence[Value],
    ) -> list[Value]:
        """Two in-features of a lane at a time."""
        sums, chains, name = list(sums), self.chains(len(x)), "llvm.x86.avx512bf16.dpbf16ps.512"
        for number, quad in enumerate(quads):
            for half in (0, 1):
                pairs = self._pairs(e, e.b.and_(moved(e, quad, -8 * half), e.constant(0x00FF00FF)))
                for token, pointer in enumerate(x):
                    read = e.loaded_splat(e.at(pointer, 2 * (STRIDE * number + 2 * half)), I32)
                    for part, pair in enumerate(pairs):
                        turn = (2 * number + half) % (chains // self.parts) * self.parts
                        k = token * chains + turn + part
                        sums[k] = e.call(name, vector(F32), sums[k], pair, e.b.bitcast(read, vector(BF16, 2 * LANES)))
        return sums

    def _pairs(self, e: Vectors, pair: Value) -> list[Value]:
        """bfloat16 of two codes in each lane; of codes of 8 bits, of the lower four and of the upper four."""
        levels, kind = self.form.levels, vector(BF16, 2 * LANES)
        if isinstance(levels, Table):
            bits = _sixteen(values_of(levels).bfloat16().view(torch.int16).tolist())
            table = ir.Constant(vector(I16, 2 * LANES), bits * (2 * LANES // len(bits)))
            index = e.b.bitcast(pair, table.type)
            return [e.b.bitcast(e.call("llvm.x86.avx512.permvar.hi.512", table.type, table, index), kind)]
        if self.parts == 2:
            nibbles = [e.b.and_(moved(e, pair, shift), e.constant(0x000F000F)) for shift in (0, -4)]
        else:
            nibbles = [pair]
        return [e.b.bitcast(e.b.or_(nibble, e.constant(ONE)), kind) for nibble in nibbles]

    def total(self, e: Vectors, sums: list[Value], token: int, tokens: int) -> Value:
        """The upper four bits count 16 times."""
        chains = self.chains(tokens)
        own = sums[token * chains : (token + 1) * chains]
        parts = [folded(e.b.fadd, own[part :: self.parts]) for part in range(self.parts)]
        return parts[0] if self.parts == 1 else e.fma(parts[1], e.constant(16.0, F32), parts[0])

    def _activations(self, e: Vectors, c: Context, token: Value, number: Value) -> Value:
        place = e.b.add(e.times(token, c["chunks"], CHUNK), e.times(number, LANES))
        return as_float(e, e.load(e.at(c["x"], e.times(place, 2)), BF16), torch.bfloat16)


class Int8Emitter(Emitter):
    """Products of codes with activations that are rounded to 8 bits, in groups of 32: exact sums of integers, times
    what the activations were rounded by."""

    activation_bytes = 1

    @property
    def prepares(self) -> bool:
        """They are rounded."""
        return True

    @property
    def begins(self) -> float:
        """Levels of a table are bytes from 0."""
        return 128.0 if isinstance(self.form.levels, Table) else self.form.middle

    def chains(self, tokens: int) -> int:
        """Of float32; those of integers begin anew with every chunk."""
        return 1

    def add(
        self,
        e: Vectors,
        sums: list[Value],
        quads: Sequence[Value],
        x: Sequence[Value],
        steps: Sequence[Value],
    ) -> list[Value]:
        """Four in-features of a lane at a time."""
        chains, sums = 2 if len(x) == 1 else 1, list(sums)
        whole = [[ir.Constant(vector(I32), None)] * chains for _ in x]
        for number, quad in enumerate(quads):
            if isinstance(self.form.levels, Table):
                quad = self._shuffled(e, _sixteen([int(v) + 128 for v in values_of(self.form.levels).tolist()]), quad)
            for token, pointer in enumerate(x):
                k, read = number % chains, e.loaded_splat(e.at(pointer, STRIDE * number), I32)
                whole[token] = [*whole[token][:k], self._dot(e, whole[token][k], quad, read), *whole[token][k + 1 :]]
        for token, parts in enumerate(whole):
            whole_sum = e.b.sitofp(folded(e.b.add, parts), vector(F32))
            sums[token] = e.fma(whole_sum, e.loaded_splat(steps[token], F32), sums[token])
        return sums

    def _shuffled(self, e: Vectors, table: list[int], quad: Value) -> Value:
        """Bytes of a table, by the bytes of a word."""
        if self.target.dots == "vnni512":
            kind, name = vector(I8, 64), "llvm.x86.avx512.pshuf.b.512"
            return e.b.bitcast(e.call(name, kind, ir.Constant(kind, table * 4), e.b.bitcast(quad, kind)), vector(I32))
        kind, name = vector(I8, 32), "llvm.x86.avx2.pshuf.b"
        halves = [e.call(name, kind, ir.Constant(kind, table * 2), e.b.bitcast(half, kind)) for half in e.halves(quad)]
        return e.joined(*(e.b.bitcast(half, vector(I32, 8)) for half in halves))

    def _dot(self, e: Vectors, total: Value, codes: Value, x: Value) -> Value:
        """total + the four products of unsigned codes and signed activations in each lane."""
        if self.target.dots == "vnni512":
            return e.call("llvm.x86.avx512.vpdpbusd.512", vector(I32), total, codes, x)
        halves = zip(*(e.halves(value) for value in (total, codes, x)), strict=True)
        return e.joined(*(self._dot_half(e, *half) for half in halves))

    def _dot_half(self, e: Vectors, total: Value, codes: Value, x: Value) -> Value:
        if self.target.dots == "vnni256":
            return e.call("llvm.x86.avx512.vpdpbusd.256", vector(I32, 8), total, codes, x)
        kind = vector(I8, 32)
        codes, x = e.b.bitcast(codes, kind), e.b.bitcast(x, kind)
        pairs = e.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), codes, x)  # 127 * 127 * 2 fits 16 bits
        return e.b.add(total, e.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, e.constant(1, I16, 16)))

    def _round(self, e: Vectors, c: Context, token: Value) -> None:
        chunks, largest, size, kind = c["chunks"], "llvm.maxnum.v16f32", BYTES[self.out], FLOATS[self.out]

        def chunk(number: Value, _: list[Value]) -> list[Value]:
            place = e.b.add(e.times(token, chunks), number)
            here = e.at(c["x"], e.times(place, size * CHUNK))
            read = [as_float(e, e.load(e.at(here, size * k), self.out), kind) for k in range(0, CHUNK, LANES)]
            sizes = [e.call("llvm.fabs.v16f32", vector(F32), value) for value in read]
            top = across(e, lambda a, b: e.call(_named(largest, a), a.type, a, b), e.call(largest, vector(F32), *sizes))
            e.b.store(e.b.fmul(top, ir.Constant(F32, 1 / 127)), e.at(c["rounding"], e.times(place, 4)), align=4)
            is_there = e.b.fcmp_ordered(">", top, ir.Constant(F32, 0.0))
            inverse = e.b.select(is_there, e.b.fdiv(ir.Constant(F32, 127.0), top), ir.Constant(F32, 0.0))
            for k, value in enumerate(read):
                near = e.call("llvm.rint.v16f32", vector(F32), e.b.fmul(value, e.splat(inverse)))
                byte = e.b.trunc(e.b.fptosi(near, vector(I32)), vector(I8))
                order = [first + feature for first in range(0, LANES, STRIDE) for feature in ORDER]
                byte = e.b.shuffle_vector(byte, byte, ir.Constant(vector(I32), order))
                e.b.store(byte, e.at(c["rounded"], e.times(place, CHUNK), LANES * k), align=1)
            return []

        e.loop(0, chunks, [], chunk)

    def _activations(self, e: Vectors, c: Context, token: Value, number: Value) -> Value:
        whole = e.times(token, c["chunks"])
        place = e.b.add(e.times(whole, CHUNK), e.times(number, LANES))
        step = e.times(e.b.add(whole, e.b.udiv(number, e.index(CHUNK // LANES))), 4)
        rounded = e.b.sitofp(e.b.sext(e.load(e.at(c["rounded"], place), I8), vector(I32)), vector(F32))
        return e.b.fmul(rounded, e.loaded_splat(e.at(c["rounding"], step), F32))


EMITTERS = {"float32": Emitter, "bfloat16": BFloat16Emitter, "int8": Int8Emitter}


def started(module: ir.Module, name: str, args: list[ir.Type]) -> tuple[ir.Function, Vectors]:
    """A function that returns nothing."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), args), name)
    return function, Vectors(ir.IRBuilder(function.append_basic_block()))


def share(e: Vectors, count: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
    """From where to where a thread goes."""
    first, last = (e.b.udiv(e.b.mul(count, number), threads) for number in (thread, e.b.add(thread, e.index(1))))
    return first, last


def smaller(e: Vectors, a: Value, b: Value) -> Value:
    """Of two numbers."""
    return e.b.select(e.b.icmp_unsigned("<", a, b), a, b)


def moved(e: Vectors, value: Value, bits: int) -> Value:
    """Bits moved up, or down."""
    if bits == 0:
        return value
    count = ir.Constant(value.type, [abs(bits)] * value.type.count)
    return e.b.shl(value, count) if bits > 0 else e.b.lshr(value, count)


def folded(add: Callable[[Value, Value], Value], values: list[Value]) -> Value:
    """The sum of some vectors."""
    while len(values) > 1:
        half = len(values) // 2
        values = [add(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def across(e: Vectors, add: Callable[[Value, Value], Value], value: Value) -> Value:
    """The sum of a vector's lanes, or the largest."""
    while value.type.count > 1:
        value = add(*e.halves(value))
    return e.b.extract_element(value, ir.Constant(I32, 0))


def as_float(e: Vectors, value: Value, kind: torch.dtype) -> Value:
    """Numbers of lines in float32."""
    if kind == torch.float32:
        return value
    if kind == torch.float16:
        return e.b.fpext(value, vector(F32))
    if kind == torch.bfloat16:
        bits = e.b.zext(e.b.bitcast(value, vector(I16)), vector(I32))
        return e.b.bitcast(moved(e, bits, 16), vector(F32))
    if kind == torch.float8_e4m3fn:  # no scale is negative
        half = e.b.bitcast(moved(e, e.b.zext(value, vector(I16)), 7), vector(F16))
        return e.b.fmul(e.b.fpext(half, vector(F32)), e.constant(HALF_UNIT, F32))
    return e.b.sitofp((e.b.sext if kind == torch.int8 else e.b.zext)(value, vector(I32)), vector(F32))


def _sixteen(values: list) -> list:
    """A register's worth: what fills it up is never looked up."""
    return values + values[:1] * (16 - len(values))


def _named(name: str, like: Value) -> str:
    """An intrinsic of as many lanes as a value has."""
    return name.replace("v16", f"v{like.type.count}")
