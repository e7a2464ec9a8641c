"""What is sensible to make of a model for an engine, and what multiplies by it on a device: choices.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from halfbyte.sizing.devices import Device

PLAIN = "16 bits"
"""The choice to leave a model as it is."""


@dataclass(frozen=True)
class Kernel:
    """What multiplies by a scheme in an engine, and on which devices."""

    name: str
    computes: str
    """The arithmetic of large batches: fp16, int8, fp8 or fp4."""
    source: str
    since: float | None = None
    """The first compute capability; None: it does not run on NVIDIA's cards."""
    until: float | None = None
    """The first compute capability without it."""
    others: tuple[str, ...] = ()
    """Makers of devices on which it runs too."""
    note: str = ""

    def runs_on(self, device: Device) -> bool | None:
        """Whether a device has it; None where that is unknown of the device."""
        if device.vendor != "nvidia":
            has_floats = self.computes not in ("fp8", "fp4") or device.arithmetic(self.computes) is not None
            return None if device.vendor == "unknown" else device.vendor in self.others and has_floats
        if device.capability is None:
            return None
        return self.since is not None and self.since <= device.capability < (self.until or float("inf"))


@dataclass(frozen=True)
class Choice:
    """A scheme by the name that tables have for it, the words of a recipe that make it, and its kernels, fastest
    first."""

    name: str
    kernels: tuple[Kernel, ...]
    recipe: Mapping[str, str | bool] = field(default_factory=dict, hash=False)

    def kernel_on(self, device: Device) -> Kernel | None:
        """The fastest that a device has, or may have where too little is known of it."""
        return next((kernel for kernel in self.kernels if kernel.runs_on(device) is not False), None)


@cache
def choices() -> dict[str, dict[str, Choice]]:
    """By engine, then by name, as choices.yaml has them."""
    text = files("halfbyte.sizing").joinpath("choices.yaml").read_text(encoding="utf-8")
    return {engine: {n: _choice(n, row) for n, row in rows.items()} for engine, rows in yaml.safe_load(text).items()}


def _choice(name: str, row: Mapping[str, Any]) -> Choice:
    kernels = tuple(Kernel(**{**kernel, "others": tuple(kernel.get("others", ()))}) for kernel in row["kernels"])
    return Choice(name, kernels, dict(row.get("recipe", {})))
