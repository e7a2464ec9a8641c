"""Rewrites of a block that leave its function as it is and make its weights, and what they read, easier to round."""

from collections.abc import Callable
from functools import partial

from halfbyte.transforms.awq import awq
from halfbyte.transforms.scale import TransformSettings, scaled
from halfbyte.transforms.smoothquant import smoothquant

Transform = Callable[..., list[dict]]
"""(block, finder, {weight: scheme}, {weight: statistics}, settings) -> what was done, for the report"""

TRANSFORMS: dict[str, Transform] = {
    "awq": partial(scaled, choose=awq),
    "smoothquant": partial(scaled, choose=smoothquant),
}

__all__ = ["TRANSFORMS", "Transform", "TransformSettings"]
