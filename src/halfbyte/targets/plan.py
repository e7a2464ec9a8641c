"""Job: a recipe that fits its checkpoint."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

import torch

from halfbyte.containers import Container
from halfbyte.containers.kv import KVGrid
from halfbyte.containers.safetensors import Spec
from halfbyte.engines.engines import FUSED
from halfbyte.engines.verdicts import Verdict
from halfbyte.errors import BadRequest
from halfbyte.grids.quantized import AnyScheme
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.recipe import Method, Recipe
from halfbyte.targets.gguf import presets
from halfbyte.targets.gguf.container import type_of

SKIPPED, AS_ASKED = "skipped as asked", "kept as asked"
NOTED = 0.1
"""A share of a model's weights whose fate is told in a warning."""


@dataclass(frozen=True)
class Choice:
    """What becomes of a weight: a scheme, or None and the reason why it stays."""

    weight: Weight
    scheme: AnyScheme | None
    note: str = ""


@dataclass
class Job:
    """A recipe that fits its checkpoint."""

    recipe: Recipe
    checkpoint: Checkpoint
    container: Container
    method: Method
    choices: list[Choice]
    kept: dict[str, str]
    """Tensor to the reason why it is copied as it is."""
    verdicts: list[Verdict] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensor to the reason why the output has none such."""
    preset: str | None = None
    """What a GGUF says that it is."""
    warnings: list[str] = field(default_factory=list)
    plain_dtype: torch.dtype | None = None
    """What tensors of floats that are not quantized are written in; None: each in its own."""
    kv: KVGrid | None = None
    """The KV cache that the output says it has, and the tensors of its scales."""
    scales: dict[str, Spec] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[Weight, AnyScheme]:
        return {c.weight: c.scheme for c in self.choices if c.scheme}

    @property
    def units(self) -> list[list[Weight]]:
        """Weights that are rounded as one matrix, most of them alone: what engines fuse, where all rows share a parameter. They
        take one for all, and round again (or decode wrongly) where each has its own."""
        schemes = self.schemes
        units: dict[tuple, list[Weight]] = {}
        for weight, scheme in schemes.items():
            home, _, last = weight.name.rpartition(".")
            fused = next((f for f in FUSED if last in f), None) if scheme.weight.shares_params_across_rows else None
            units.setdefault((home, fused, scheme) if fused else (weight.name,), []).append(weight)
        return list(units.values())

    def spec(self, tensor: str) -> Spec:
        """Shape and dtype in which a tensor that is not quantized is written, by its name in the checkpoint."""
        spec = self.checkpoint.spec(tensor)
        return Spec(spec.shape, self.plain_dtype) if self.plain_dtype and spec.dtype.is_floating_point else spec

    @property
    def plain(self) -> str | None:
        """The type of every matrix, where none is quantized."""
        return self.preset if self.preset in presets.PLAIN else None

    @property
    def label(self) -> str:
        """What most of the output is: of a GGUF its preset, or the commonest type."""
        if self.preset:
            return self.preset
        if self.container.name != "gguf" and self.recipe.method != "convert":
            return self.recipe.grid
        named = [type_of(s.weight) if self.container.name == "gguf" else str(s) for s in self.schemes.values()]
        return max(named, key=named.count) if named else self.recipe.grid

    @property
    def wider(self) -> str:
        """What to do about numbers that the output's 16 bits have not."""
        if self.recipe.method == "dequantize":
            return "write --dtype bfloat16 or float32"
        return (
            "write --grid BF16 or F32, or --skip it"
            if self.plain
            else "quantize the model from which this one was made"
        )

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model."""
        return self.method.calibrated or any(s.activations and s.activations.static for s in self.schemes.values())


def keep(checkpoint: Checkpoint, choices: list[Choice]) -> dict[str, str]:
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
    found = [unasked] if unasked else []
    kept, taken = (sum(prod(checkpoint.spec(t).shape) for t in tensors) for tensors in (others, linears))
    if kept > NOTED * (kept + taken):
        first, reason = next(iter(others.items()))
        found.append(
            f"{100 * kept / (kept + taken):.0f}% of the weights in blocks stay as they are, such as '{first}': {reason}"
        )
    return found


def matches(weight: Weight, pattern: str) -> bool:
    """`layers.0.*` matches model.layers.0.mlp.up_proj: a pattern may start at any dot."""
    return any(fnmatch.fnmatchcase(name, p) for name in (weight.name, weight.tensor) for p in (pattern, f"*.{pattern}"))


def check_patterns(weights: list[Weight], patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(matches(w, pattern) for w in weights):
            raise BadRequest(
                f"pattern '{pattern}' matches no weight; they are called like {next(w.name for w in weights if w.block)}"
            )


def commonest(found: Iterable[tuple[AnyScheme, tuple[int, ...]]]) -> str:
    names = [str(scheme) for scheme, _ in found]
    return max(set(names), key=names.count) if names else "no weights"
