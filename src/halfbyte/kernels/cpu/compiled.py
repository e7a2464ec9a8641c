"""How what runs on CPUs is compiled, and run in threads.

A kernel handles a range of rows, or of other tasks that do not depend on each other: kernel(first, last, ...). Threads
are shared out in Python, not by the compiler: compiled code for threads takes three times as long to make, and there
would be one kind of threads more.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import torch

# Without reassoc, sums are taken in the order written; another order would undo splittings such as the one in
# `tiles.half`.
ORDERED, LOOSE = {"contract", "nsz"}, {"reassoc", "contract", "nsz", "arcp"}
COMMON: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
CALLED: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True}
SHARES = 4
"""Pieces that each thread gets, one after another: one that is held up does not keep the others waiting."""


def kernel_with(fastmath: set[str] | bool) -> Callable:
    """What Python calls, and the only thing that is cached, if there is a place where this may be written: beside the
    package, or in a home."""

    def compiled(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, fastmath=fastmath, **COMMON)(function)
        except (RuntimeError, OSError):  # Numba looks for the place now; it compiles later
            return numba.njit(fastmath=fastmath, **COMMON)(function)

    return compiled


def part_with(fastmath: set[str] | bool) -> Callable:
    """What kernels call, with rules of arithmetic of its own: it is compiled by itself and always inlined.

    If not, LLVM would optimise it once by itself and again in each caller, with sums in another order, and a process
    would use the copy loaded first: not the same one when it compiles and when it reads the cache.
    """
    return numba.njit(fastmath=fastmath, **COMMON, **CALLED)


inline = numba.njit(inline="always", **COMMON)
"""What becomes part of its callers before they are compiled, and takes their rules of arithmetic."""
kernel, part = kernel_with(ORDERED), part_with(ORDERED)
loose_kernel, loose = kernel_with(LOOSE), part_with(LOOSE)
"""Sums may be taken in any order: LLVM can then add up in vectors."""
strict_kernel, strict = kernel_with(False), part_with(False)
"""Each operation is rounded. (Said, not left out: what says nothing takes the rules of the caller that it is first
compiled for.)"""


def in_threads(run: Callable, tasks: int, *args: object) -> None:
    """Call a kernel for all tasks, in as many threads as torch would use here."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        run(0, tasks, *args)
        return
    shares = min(threads * SHARES, tasks)
    borders = [share * tasks // shares for share in range(shares + 1)]
    executor = pool(threads)
    for done in [executor.submit(run, first, last, *args) for first, last in pairwise(borders)]:
        done.result()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Kept: of a small model, to start threads takes as long as what they compute."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=pool.cache_clear)
