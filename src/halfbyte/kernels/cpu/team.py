"""Threads that wait for products, and share each out among them piece by piece.

Between two products of a model that answers lie some 40 us. Threads that sleep so long take as long again to wake, and
threads that spin without end, as those of OpenMP do, take a neighbour's time. Here they spin for a moment and then
sleep; and nobody waits for one who is held up, since who comes takes the next piece, and all pieces if nobody else
comes.

A piece is one call `function(context, number, pieces)`. The state of a team is one word, the ticket: which job (upper
half) and how many pieces of it are left (lower half). To take a piece is to count it down by a compare-and-swap, which
fails where the job is another by now: so whoever succeeds has read the function and the context of this very job, for
the next begins only when all pieces of it are done.
"""

import atexit
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from llvmlite import ir

from halfbyte.kernels.cpu import native
from halfbyte.kernels.cpu.compiled import pool
from halfbyte.kernels.cpu.vectors import I32, I64, POINTER, Value

LINE = 128
"""Bytes that processors pass to one another together: what several write lies so far apart."""
TICKET, DONE, BUSY, SLEEPING, FUNCTION, CONTEXT, PIECES, THREADS, STOPPED, MEMBERS = (
    *(LINE * number for number in range(4)),
    *(LINE * 4 + 8 * number for number in range(5)),
    LINE * 5,
)
"""Where what lies: pieces of the job that are done, whether there is a job, how many members sleep, the job."""
MOST = 256
"""Members."""
WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
SPINS = 2048
"""Pauses before a member sleeps: about 90 us where one takes 140 cycles, as on Intel's processors since 2016."""
FUTEX_WAIT, FUTEX_WAKE, EVERYONE = 128, 129, (1 << 31) - 1
"""Operations of a futex among the threads of one process."""
PAUSES = {"x86_64": "llvm.x86.sse2.pause", "aarch64": "llvm.aarch64.hint"}
FUTEXES = {"x86_64": 202, "aarch64": 98}
"""By processor: what tells it that a thread waits, and the number of the system call."""


class Team:
    """Members are started as they are needed, and stopped when the process ends."""

    def __init__(self):
        libc = ctypes.CDLL(None)
        libc.calloc.restype = ctypes.c_void_p
        made = native.compiled("team", _emit, ("run", "member"))
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)(made["run"])
        self._member = made["member"]
        # Never given back: a member may look at it until the process is gone.
        self._state = (libc.calloc(MEMBERS + 16 * MOST + LINE, 1) + LINE - 1) // LINE * LINE
        self._libc, self._lock, self._members, self._most = libc, Lock(), [], MOST
        atexit.register(self._stop, os.getpid())

    def run(self, first: int, function: int, context: int, pieces: int, threads: int, wakes: bool) -> None:
        """first(context, 0, 1), if there is one; then function(context, number, pieces) of all numbers, by at most so
        many threads, this one among them. Those that sleep take part only if it `wakes` them. Where the team is at work
        for somebody else, this one does it all."""
        if min(threads - 1, self._most) > len(self._members):
            self._start(threads - 1)
        self._run(self._state, first, function, context, pieces, threads, wakes)

    def _start(self, count: int) -> None:
        with self._lock:
            while len(self._members) < min(count, self._most):
                own, thread = self._state + MEMBERS + 16 * len(self._members), ctypes.c_ulong()
                ctypes.memmove(own, (ctypes.c_int64 * 2)(self._state, len(self._members) + 1), 16)
                own_signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # members inherit that
                refused = self._libc.pthread_create(
                    ctypes.byref(thread), None, ctypes.c_void_p(self._member), ctypes.c_void_p(own)
                )
                signal.pthread_sigmask(signal.SIG_SETMASK, own_signals)
                if refused:  # the system has no more: those that there are do it all
                    self._most = len(self._members)
                else:
                    self._members.append(thread)

    def _stop(self, process: int) -> None:
        """Before their code is freed."""
        if os.getpid() == process:  # a child has none of its parent's threads
            self._most = 0
            ctypes.c_int64.from_address(self._state + STOPPED).value = 1
            self._run(self._state, 0, 0, 0, 0, MOST, True)
            for thread in self._members:
                self._libc.pthread_join(thread, None)


@cache
def team() -> Team:
    """That of this process."""
    return Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)
_THREADS: list[int] = []
"""For products, where torch has one."""


@contextmanager
def for_products_alone() -> Iterator[None]:
    """Operations of torch's take one thread meanwhile, and products as many as before: of a token there is less to add
    up than it takes to wake another. (Attention to 16 tokens with two of OpenMP's threads: 130 us.)"""
    threads = torch.get_num_threads()
    _THREADS.append(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _THREADS.pop()


IS_POSSIBLE = sys.platform == "linux" and platform.machine() in FUTEXES
"""Whether threads can sleep until a number changes."""


def share_out(first: int, function: int, context: ctypes.Array, pieces: int, wakes: bool = True) -> None:
    """first(context, 0, 1), if there is one; then function(context, number, pieces) of all numbers, in as many threads
    as torch would use here."""
    address, threads = ctypes.addressof(context), min(_THREADS[-1] if _THREADS else torch.get_num_threads(), pieces)
    if IS_POSSIBLE:
        team().run(first, function, address, pieces, threads, wakes)
        return
    if first:
        WORKER(first)(address, 0, 1)
    if threads == 1:
        WORKER(function)(address, 0, 1)
    else:
        for done in [pool(threads).submit(WORKER(function), address, number, pieces) for number in range(pieces)]:
            done.result()


def _emit() -> ir.Module:
    module = ir.Module("team")
    _emit_run(module)
    _emit_member(module)
    return module


class _Code:
    """A function under way, of a team's state."""

    def __init__(self, module: ir.Module, name: str, returned: ir.Type, args: list[ir.Type]):
        self.function = ir.Function(module, ir.FunctionType(returned, args), name)
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self._module, self._own = module, platform.machine()

    def block(self) -> ir.Block:
        """One more."""
        return self.b.append_basic_block()

    def go_on(self, block: ir.Block) -> None:
        """From here on in that block."""
        self.b.position_at_end(block)

    def at(self, state: Value, place: int) -> Value:
        """Where something of the state lies."""
        return self.b.gep(state, [ir.Constant(I64, place)], source_etype=ir.IntType(8))

    def load(self, state: Value, place: int) -> Value:
        """What others write."""
        return self.b.load_atomic(self.at(state, place), "seq_cst", 8, typ=I64)

    def store(self, value: Value | int, state: Value, place: int) -> None:
        """What others read."""
        value = ir.Constant(I64, value) if isinstance(value, int) else value
        self.b.atomic_rmw("xchg", self.at(state, place), value, "seq_cst")  # llvmlite's store_atomic fails

    def add(self, value: int, state: Value, place: int) -> None:
        """In one step."""
        self.b.atomic_rmw("add", self.at(state, place), ir.Constant(I64, value), "seq_cst")

    def exchanged(self, before: Value | int, after: Value | int, state: Value, place: int) -> Value:
        """Whether `before` was there, and `after` is in its place."""
        values = [ir.Constant(I64, v) if isinstance(v, int) else v for v in (before, after)]
        both = self.b.cmpxchg(self.at(state, place), values[0], values[1], "seq_cst", "seq_cst")
        return self.b.extract_value(both, 1)

    def call(self, name: str, returned: ir.Type, *args: Value) -> Value:
        """Of the system, or an intrinsic."""
        known = self._module.globals.get(name)
        kinds = [arg.type for arg in args]
        return self.b.call(known or ir.Function(self._module, ir.FunctionType(returned, kinds), name), args)

    def pause(self) -> None:
        """Of one who spins."""
        arguments = [] if self._own == "x86_64" else [ir.Constant(I32, 1)]
        self.call(PAUSES[self._own], ir.VoidType(), *arguments)

    def futex(self, state: Value, operation: int, value: Value) -> None:
        """Of the number of the job."""
        numbers = [ir.Constant(I64, FUTEXES[self._own]), self.at(state, TICKET + 4), ir.Constant(I64, operation)]
        self.call("syscall", I64, *numbers, value, ir.Constant(POINTER, None))

    def take(self, state: Value, ticket: Value, otherwise: ir.Block) -> None:
        """One piece of the ticket's job, if it is still that; then it is done."""
        b, taken = self.b, self.block()
        job = [self.load(state, place) for place in (FUNCTION, CONTEXT, PIECES)]
        after = b.sub(ticket, ir.Constant(I64, 1))
        b.cbranch(self.exchanged(ticket, after, state, TICKET), taken, otherwise)
        self.go_on(taken)
        self.work(job[0], job[1], b.sub(job[2], self.left(ticket)), job[2])
        self.add(1, state, DONE)

    def work(self, function: Value, context: Value, number: Value | int, pieces: Value | int) -> None:
        """function(context, number, pieces)"""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I64, I64])
        counts = [ir.Constant(I64, count) if isinstance(count, int) else count for count in (number, pieces)]
        self.b.call(self.b.inttoptr(function, kind.as_pointer()), [self.b.inttoptr(context, POINTER), *counts])

    def left(self, ticket: Value) -> Value:
        """Pieces."""
        return self.b.and_(ticket, ir.Constant(I64, (1 << 32) - 1))

    def number(self, ticket: Value) -> Value:
        """Of the job."""
        return self.b.lshr(ticket, ir.Constant(I64, 32))


def _emit_run(module: ir.Module) -> None:
    """run(state, first, function, context, pieces, threads, wakes)"""
    c = _Code(module, "run", ir.VoidType(), [POINTER, *[I64] * 6])
    state, first, function, context, pieces, threads, wakes = c.function.args
    b, zero = c.b, ir.Constant(I64, 0)
    alone, together, woken, taking, some, waiting, ask = (c.block() for _ in range(7))

    prepared, unprepared = c.block(), c.block()
    b.cbranch(b.icmp_unsigned("!=", first, zero), unprepared, prepared)
    c.go_on(unprepared)
    c.work(first, context, 0, 1)
    b.branch(prepared)
    c.go_on(prepared)
    is_single = b.or_(
        b.icmp_unsigned("==", pieces, ir.Constant(I64, 1)), b.icmp_unsigned("<=", threads, ir.Constant(I64, 1))
    )
    b.cbranch(is_single, alone, ask)
    c.go_on(ask)
    b.cbranch(c.exchanged(0, 1, state, BUSY), together, alone)
    c.go_on(alone)
    c.work(function, context, 0, 1)
    b.ret_void()

    c.go_on(together)
    for value, place in ((function, FUNCTION), (context, CONTEXT), (pieces, PIECES), (threads, THREADS), (zero, DONE)):
        c.store(value, state, place)
    number = b.add(c.number(c.load(state, TICKET)), ir.Constant(I64, 1))
    c.store(b.or_(b.shl(number, ir.Constant(I64, 32)), pieces), state, TICKET)
    wake = b.and_(b.icmp_unsigned("!=", wakes, zero), b.icmp_unsigned("!=", c.load(state, SLEEPING), zero))
    b.cbranch(wake, woken, taking)
    c.go_on(woken)
    c.futex(state, FUTEX_WAKE, ir.Constant(I64, EVERYONE))
    b.branch(taking)

    c.go_on(taking)
    ticket = c.load(state, TICKET)
    b.cbranch(b.icmp_unsigned("==", c.left(ticket), zero), waiting, some)
    c.go_on(some)
    c.take(state, ticket, taking)
    b.branch(taking)

    c.go_on(waiting)
    _emit_wait(c, state, pieces)
    c.store(0, state, BUSY)
    b.ret_void()


def _emit_wait(c: _Code, state: Value, pieces: Value) -> None:
    """Until all pieces are done: those that others have begun."""
    b, before = c.b, c.b.block
    waiting, patient, give_way, again, over = (c.block() for _ in range(5))
    b.branch(waiting)
    c.go_on(waiting)
    spins = b.phi(I64)
    spins.add_incoming(ir.Constant(I64, 0), before)
    c.pause()
    b.cbranch(b.icmp_unsigned("==", c.load(state, DONE), pieces), over, patient)
    c.go_on(patient)
    b.cbranch(b.icmp_unsigned(">", spins, ir.Constant(I64, SPINS)), give_way, again)
    c.go_on(give_way)  # whoever is held up may need this very processor
    c.call("sched_yield", I32)
    b.branch(again)
    c.go_on(again)
    spins.add_incoming(b.add(spins, ir.Constant(I64, 1)), again)
    b.branch(waiting)
    c.go_on(over)


def _emit_member(module: ir.Module) -> None:
    """member(own): takes pieces until the team is stopped. `own`: the state, and its number among the threads."""
    c = _Code(module, "member", POINTER, [POINTER])
    b, zero, one = c.b, ir.Constant(I64, 0), ir.Constant(I64, 1)
    state = b.load(c.function.args[0], typ=POINTER, align=8)
    own_number = b.load(c.at(c.function.args[0], 8), typ=I64, align=8)
    entry, looking, some, idle, spinning, sleeping, stopped = b.block, *(c.block() for _ in range(6))
    b.branch(looking)

    c.go_on(looking)
    spins = b.phi(I64)
    spins.add_incoming(zero, entry)
    ticket = c.load(state, TICKET)
    takes_part = b.icmp_unsigned("<", own_number, c.load(state, THREADS))
    b.cbranch(b.and_(takes_part, b.icmp_unsigned("!=", c.left(ticket), zero)), some, idle)
    c.go_on(some)
    lost = c.block()
    c.take(state, ticket, lost)
    spins.add_incoming(zero, b.block)
    b.branch(looking)
    c.go_on(lost)
    spins.add_incoming(zero, lost)
    b.branch(looking)

    c.go_on(idle)
    b.cbranch(b.and_(takes_part, b.icmp_unsigned("<", spins, ir.Constant(I64, SPINS))), spinning, sleeping)
    c.go_on(spinning)
    c.pause()
    spins.add_incoming(b.add(spins, one), spinning)
    b.branch(looking)

    c.go_on(sleeping)
    c.add(1, state, SLEEPING)
    c.futex(state, FUTEX_WAIT, c.number(ticket))
    c.add(-1, state, SLEEPING)
    awake = c.block()
    b.cbranch(b.icmp_unsigned("!=", c.load(state, STOPPED), zero), stopped, awake)
    c.go_on(awake)
    spins.add_incoming(zero, awake)
    b.branch(looking)
    c.go_on(stopped)
    b.ret(ir.Constant(POINTER, None))
