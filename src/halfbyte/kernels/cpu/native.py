"""How vector code becomes machine code, is kept, and runs in threads. No compiler is needed but LLVM's own, which
Numba brings along as llvmlite."""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
import torch
from llvmlite import binding, ir

from halfbyte import surroundings
from halfbyte.kernels.cpu.compiled import pool


@cache
def features() -> frozenset[str]:
    """What this processor can do, as LLVM calls it; nothing where LLVM cannot tell."""
    try:
        return frozenset(name for name, here in binding.get_host_cpu_features().items() if here)
    except RuntimeError:
        return frozenset()


@cache
def _target() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=",".join(f"+{name}" for name in sorted(features())),
        opt=3,
        jit=True,
        codemodel="jitdefault",
    )


_ENGINES: list[binding.ExecutionEngine] = []
"""Machine code lives as long as its engine does."""
WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Worker:
    """A function of a context, the number of a thread, and how many there are."""

    def __init__(self, one: int, each: int):
        self._one, self._each = WORKER(one), each

    def __call__(self, context: ctypes.Array, threads: int) -> None:
        """All threads at the same time: those of torch's own OpenMP, so that there is one pool, or Python's."""
        address = ctypes.addressof(context)
        if threads <= 1:
            self._one(address, 0, 1)
        elif self._each and (openmp := _openmp()):
            openmp.GOMP_parallel(self._each, address, threads, 0)
        else:
            for done in [pool(threads).submit(self._one, address, number, threads) for number in range(threads)]:
                done.result()


def workers(name: str, emit: Callable[[], ir.Module], exports: tuple[str, ...]) -> dict[str, Worker]:
    """The functions of a module, which is compiled if it was not before with these sources, on such a processor."""
    with_openmp = _openmp() is not None
    key = f"{name}|{with_openmp}|{binding.get_host_cpu_name()}|{sorted(features())}|{llvmlite.__version__}"
    kept = _place(hashlib.sha256(key.encode()).hexdigest()[:24])
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target())
    if kept and kept.is_file():
        code = kept.read_bytes()
    else:
        module = emit()
        for export in exports if with_openmp else ():
            _emit_each(module, export)
        code = _compiled(module)
        _keep(kept, code)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    address = engine.get_function_address
    return {name: Worker(address(name), address(f"{name}_each") if with_openmp else 0) for name in exports}


def _compiled(module: ir.Module) -> bytes:
    parsed, target = binding.parse_assembly(str(module)), _target()
    parsed.verify()
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    return target.emit_object(parsed)


def _emit_each(module: ir.Module, name: str) -> None:
    """name_each(context): what each thread of OpenMP does."""
    number = ir.IntType(32)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.PointerType()]), f"{name}_each")
    b = ir.IRBuilder(function.append_basic_block())
    asked = ("omp_get_thread_num", "omp_get_num_threads")
    known = [module.globals.get(ask) or ir.Function(module, ir.FunctionType(number, []), ask) for ask in asked]
    counts = [b.sext(b.call(ask, []), ir.IntType(64)) for ask in known]
    b.call(module.get_global(name), [function.args[0], *counts])
    b.ret_void()


def _place(name: str) -> Path | None:
    """Where machine code is kept: beside Numba's, under the name of all sources of kernels."""
    home = surroundings.kernels()
    return home / f"panels-{name}.o" if home else None


def _keep(place: Path | None, code: bytes) -> None:
    """Whole or not at all: another process may write it too."""
    if place:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
                file.write(code)
            os.replace(file.name, place)


@cache
def _openmp() -> ctypes.CDLL | None:
    """torch's own OpenMP; None where it has another than GNU's."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.is_file():
        return None
    openmp = ctypes.CDLL(str(library))
    openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        binding.add_symbol(name, ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value or 0)
    return openmp
