"""halfbyte makes large language models small enough to run.

>>> import halfbyte
>>> report = halfbyte.quantize("org/model", "model-int4", method="gptq", grid="int4-g128", engine="vllm", progress=True)
>>> report
<Report: gptq int4-g128 as compressed-tensors, ...>
>>> halfbyte.evaluate(["model-int4"], against="org/model")
>>> model = halfbyte.load("model-int4")

quantize, convert, dequantize and kv write checkpoints; evaluate, suite, tasks, needle, blame, inspect and compare
measure them, bench how fast they are; generate lets one answer; page shows them in a browser, push puts one on the hub;
imatrix writes an importance matrix; load gives a Transformers model.
Whatever is wrong with a request is a HalfbyteError, whose text is one line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.api import (
        advise,
        bench,
        blame,
        compare,
        convert,
        dequantize,
        evaluate,
        generate,
        imatrix,
        inspect,
        kv,
        load,
        needle,
        page,
        push,
        quantize,
        suite,
        tasks,
    )
    from halfbyte.errors import HalfbyteError
    from halfbyte.recipe import Calibration, Recipe

    __version__: str

_HOMES = {"HalfbyteError": "halfbyte.errors", "Recipe": "halfbyte.recipe", "Calibration": "halfbyte.recipe"}
__all__ = [
    "Calibration",
    "HalfbyteError",
    "Recipe",
    "advise",
    "bench",
    "blame",
    "compare",
    "convert",
    "dequantize",
    "evaluate",
    "generate",
    "imatrix",
    "inspect",
    "kv",
    "load",
    "needle",
    "page",
    "push",
    "quantize",
    "suite",
    "tasks",
]


def __getattr__(name: str) -> Any:
    # Names are found when they are used: importing halfbyte must not import torch, or `halfbyte --help` takes seconds.
    if name == "__version__":
        from importlib.metadata import version

        return version("halfbyte")
    if name not in __all__:
        raise AttributeError(f"module 'halfbyte' has no attribute '{name}'")
    return getattr(import_module(_HOMES.get(name, "halfbyte.api")), name)


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
