"""Moves of a matrix from one grid to another, value for value or nearly so."""

from halfbyte.grids.floats import FLOAT_GRIDS, NVFP4_FACTOR
from halfbyte.grids.quantized import Quantized


def with_divisor(q: Quantized) -> Quantized | None:
    """nvfp4-factor on nvfp4-global, with the same codes and scales: values differ in the last bit of fp32. None for other grids."""
    if q.grid != NVFP4_FACTOR:
        return None
    return q._replace(
        grid=FLOAT_GRIDS["nvfp4-global"],
        params={"scale": q.params["scale"], "divisor": q.params["factor"].reciprocal()},
    )
