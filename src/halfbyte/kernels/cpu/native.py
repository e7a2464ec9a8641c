"""How vector code becomes machine code, and is kept. No compiler is needed but LLVM's own, which
Numba brings along as llvmlite."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
from llvmlite import binding, ir

from halfbyte import surroundings


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


def compiled(name: str, emit: Callable[[], ir.Module], exports: tuple[str, ...]) -> dict[str, int]:
    """Addresses of the functions of a module, which is compiled if it was not before with these sources, on such a
    processor."""
    key = f"{name}|{binding.get_host_cpu_name()}|{sorted(features())}|{llvmlite.__version__}"
    kept = _place(hashlib.sha256(key.encode()).hexdigest()[:24])
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target())
    if kept and kept.is_file():
        code = kept.read_bytes()
    else:
        code = _compiled(emit())
        _keep(kept, code)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return {name: engine.get_function_address(name) for name in exports}


def _compiled(module: ir.Module) -> bytes:
    parsed, target = binding.parse_assembly(str(module)), _target()
    parsed.verify()
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    return target.emit_object(parsed)


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
