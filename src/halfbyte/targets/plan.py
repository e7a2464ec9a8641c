"""Plan: what becomes of every tensor of a checkpoint. It is made once, and does not change while it is carried out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from halfbyte.containers.safetensors import Spec
from halfbyte.engines.verdicts import Verdict
from halfbyte.grids.kv import KVGrid
from halfbyte.grids.quantized import Scheme
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.weight import Weight
from halfbyte.names import fused_set
from halfbyte.recipe import Method, Recipe

if TYPE_CHECKING:
    from halfbyte.targets.target import Target

SKIPPED, AS_ASKED = "skipped as asked", "kept as asked"
NOTED = 0.1
"""A share of a model's weights whose fate is told in a warning."""


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of a weight: a scheme, or None and the reason why it stays."""

    weight: Weight
    scheme: Scheme | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe that fits its checkpoint."""

    recipe: Recipe
    checkpoint: Checkpoint
    target: "Target"
    method: Method
    weights: tuple[TensorPlan, ...]
    unquantized: Mapping[str, str]
    """Tensor to the reason why it is copied as it is."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Tensor to the reason why the output has none such."""
    preset: str | None = None
    """A mixture of grids that has a name, where the output bears it."""
    warnings: tuple[str, ...] = ()
    unquantized_dtype: torch.dtype | None = None
    """What tensors of floats that are not quantized are written in; None: each in its own."""
    kv: KVGrid | None = None
    """The KV cache that the output says it has, and the tensors of its scales."""
    scales: Mapping[str, Spec] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    def __post_init__(self) -> None:
        for name in ("unquantized", "dropped", "scales"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @cached_property
    def schemes(self) -> Mapping[Weight, Scheme]:
        """Of every weight that is quantized."""
        return MappingProxyType({c.weight: c.scheme for c in self.weights if c.scheme})

    @cached_property
    def fused_groups(self) -> tuple[tuple[Weight, ...], ...]:
        """Weights that are rounded as one matrix, most alone: what engines fuse, where all rows share a parameter.

        Engines take one parameter for all, and round again (or decode wrongly) where each weight has its own."""
        groups: dict[tuple, list[Weight]] = {}
        for weight, scheme in self.schemes.items():
            fused = fused_set(weight.name) if scheme.weight.shares_params_across_rows else None
            groups.setdefault((fused, scheme) if fused else (weight.name,), []).append(weight)
        return tuple(map(tuple, groups.values()))

    def spec(self, tensor: str) -> Spec:
        """Shape and dtype in which a tensor that is not quantized is written, by its name in the checkpoint."""
        spec = self.checkpoint.spec(tensor)
        dtype = self.unquantized_dtype if spec.dtype.is_floating_point else None
        return Spec(spec.shape, dtype) if dtype else spec

    @property
    def label(self) -> str:
        """What most of the output is."""
        return self.target.label(self)

    @property
    def wider(self) -> str:
        """What to do about numbers that the output's 16 bits have not."""
        if self.recipe.method == "dequantize":
            return "write --dtype bfloat16 or float32"
        if not self.schemes:
            return "write --grid BF16 or F32, or --skip it"
        return "quantize the model from which this one was made"

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model."""
        return self.method.calibrated or any(s.activations and s.activations.static for s in self.schemes.values())


def unquantized_tensors(checkpoint: Checkpoint, choices: list[TensorPlan]) -> dict[str, str]:
    """Every tensor that is not quantized, with the reason."""
    quantized = {c.weight.tensor for c in choices if c.scheme}
    reasons = {c.weight.tensor: c.note for c in choices if not c.scheme}
    others = checkpoint.linears.others
    return {
        t: reasons.get(t) or others.get(t, "not a matrix of a decoder block")
        for t in checkpoint.tensors()
        if t not in quantized
    }


def doubts(checkpoint: Checkpoint) -> list[str]:
    """What is to be known of how linears were told from other tensors."""
    linears, others, unasked = checkpoint.linears
    notes = [unasked] if unasked else []
    unquantized, taken = (sum(prod(checkpoint.spec(t).shape) for t in tensors) for tensors in (others, linears))
    if unquantized > NOTED * (unquantized + taken):
        first, reason = next(iter(others.items()))
        notes.append(
            f"{100 * unquantized / (unquantized + taken):.0f}% of the weights in blocks stay as they are, "
            f"such as '{first}': {reason}"
        )
    return notes


def commonest_name(quantized: Mapping[str, tuple[Scheme, tuple[int, ...]]]) -> str:
    """What the scheme of most modules is called."""
    names = [str(scheme) for scheme, _ in quantized.values()]
    return max(set(names), key=names.count) if names else "no weights"
