"""halfbyte makes large language models small enough to run.

import halfbyte
report = halfbyte.quantize("path/to/model", "out", method="gptq", grid="int4-g128", to="compressed-tensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.api import convert, dequantize, evaluate, imatrix, inspect, kv, load, needle, quantize
    from halfbyte.errors import HalfbyteError
    from halfbyte.recipe import Recipe

__all__ = ["HalfbyteError", "Recipe", "convert", "dequantize", "evaluate", "imatrix", "inspect", "kv", "load", "needle", "quantize"]
_HOMES = {"HalfbyteError": "halfbyte.errors", "Recipe": "halfbyte.recipe"}


def __getattr__(name: str) -> Any:
    # Names are found when they are used: importing halfbyte must not import torch, or `halfbyte --help` takes seconds.
    if name not in __all__:
        raise AttributeError(f"module 'halfbyte' has no attribute '{name}'")
    return getattr(import_module(_HOMES.get(name, "halfbyte.api")), name)
