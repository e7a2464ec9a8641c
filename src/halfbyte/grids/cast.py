"""Moves of a matrix from one grid to another, value for value or nearly so."""

from halfbyte.grids.quantized import Quantized
from halfbyte.grids.scalar import NVFP4, NVFP4_FACTOR


def with_divisor(q: Quantized) -> Quantized | None:
    """nvfp4-factor on nvfp4, with the same codes and scales: values differ in the last bit of fp32. None for other
    grids."""
    if q.grid != NVFP4_FACTOR:
        return None
    return q._replace(
        grid=NVFP4,
        params={"scale": q.params["scale"], "divisor": q.params["factor"].reciprocal()},
    )
