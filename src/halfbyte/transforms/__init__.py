"""Rewrites of a block that leave its function as it is and make its weights easier to round."""

from collections.abc import Callable

from halfbyte.transforms.scale import awq

Transform = Callable[..., list[dict]]
"""(block, {weight: grid}, {weight: statistics}) -> what was done, for the report"""

TRANSFORMS: dict[str, Transform] = {"awq": awq}
