"""No number of a report is NaN or infinite: such a one says that something broke, and JSON has no word for it."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from halfbyte.errors import BrokenOutput


def require_finite(value: Any, where: str = "report") -> Any:
    """The value itself. Raises BrokenOutput, with the place of the first number that is none."""
    if isinstance(value, float) and not isfinite(value):
        raise BrokenOutput(
            f"{where} is {value}: the model, or what was made of it, computes no numbers there; nothing was written"
        )
    if isinstance(value, Mapping):
        for name, part in value.items():
            require_finite(part, f"{where}, {value['name']}, {name}" if "name" in value else f"{where}, {name}")
    elif isinstance(value, list | tuple):
        for part in value:
            require_finite(part, where)
    return value
