"""What each tensor of a checkpoint becomes where hidden states are rotated, as it is read.

A hidden state h becomes h R. What writes into it is multiplied by R where it makes channels, and what reads it where it
reads them; the gain of a norm between the two goes into what reads the norm, since R does not commute with it. Values
of an attention head may be rotated likewise, by what makes them and what reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.transforms.orthogonal import Rotation

Read = Callable[[str], Tensor]
"""Of a tensor as it is in the checkpoint."""
IN, OUT = -1, -2
"""The sides of a matrix: the channels that it reads, and those that it makes."""


@runtime_checkable
class Step(Protocol):
    """One thing that is done to a tensor."""

    def apply(self, w: Tensor, read: Read) -> Tensor:
        """The tensor after it; a matrix is [..., out, in]."""
        ...


@dataclass(frozen=True)
class Turn:
    """One side of a matrix, or a vector, is multiplied by a rotation."""

    rotation: Rotation
    side: int = IN
    heads: Int64[Tensor, "heads channels"] | None = None
    """The channels of each head, which are turned by themselves; None: all are one."""

    def apply(self, w: Tensor, read: Read) -> Tensor:
        """w R or R^T w."""
        w = w.transpose(IN, self.side) if self.side == OUT else w
        if self.heads is None:
            turned = self.rotation.apply(w)
        else:
            turned = w.clone()
            turned[..., self.heads.flatten()] = self.rotation.apply(w[..., self.heads]).flatten(-2)
        return turned.transpose(IN, self.side) if self.side == OUT else turned


@dataclass(frozen=True)
class Norm:
    """The gain of a norm."""

    weight: str
    offset: bool
    """Whether it multiplies by 1 + its weight."""

    def gain(self, read: Read) -> Tensor:
        """By channel."""
        return read(self.weight).float() + float(self.offset)


@dataclass(frozen=True)
class TakesGain:
    """The columns of what reads a norm are multiplied by its gain."""

    norm: Norm

    def apply(self, w: Tensor, read: Read) -> Tensor:
        """[..., in], with the gain in it."""
        return w * self.norm.gain(read)


@dataclass(frozen=True)
class GivesGain:
    """The norm's bias is divided by its gain, which is multiplied by later."""

    norm: Norm

    def apply(self, w: Tensor, read: Read) -> Tensor:
        """Where a channel has no gain, what reads it can have no bias of it."""
        gain = self.norm.gain(read)
        return torch.where(gain == 0, 0.0, w / gain)


@dataclass(frozen=True)
class Without:
    """The norm's weight: the gain is 1."""

    offset: bool

    def apply(self, w: Tensor, read: Read) -> Tensor:
        """Ones, or zeros that 1 is added to."""
        return torch.full_like(w, 1.0 - float(self.offset))


class TensorSteps(NamedTuple):
    """All that is done to a tensor."""

    steps: tuple[Step, ...]
    transposed: bool = False
    """Whether it lies [in, out]."""


class Found(NamedTuple):
    """What becomes of the tensors of a checkpoint, and how well that was proved."""

    steps: Mapping[str, TensorSteps]
    rotation: Rotation
    """Of hidden states."""
    error: float
    """How far the rotated model's logits are from the original's, relative to these, in 32 bits."""

    def describe(self) -> dict[str, Any]:
        """For the report."""
        turns = [[step for step in of.steps if isinstance(step, Turn)] for of in self.steps.values()]
        return {
            "kind": self.rotation.kind,
            "channels": self.rotation.size,
            "tensors": len(self.steps),
            "heads": sum(any(turn.heads is not None for turn in of) for of in turns),
            "error": self.error,
        }


class Turned:
    """What tensors of a checkpoint are turned to as they are read: in 32 bits, so that they are rounded once."""

    def __init__(self, source: Checkpoint, original: Checkpoint, find: Callable[[], Found], seed: int):
        """Of a source, which is the original with a head of its own. `find` runs the model, once; `seed` was that of
        the rotation."""
        self.source, self.original, self._find, self.seed = source, original, find, seed
        self.digest = f"rotate-{seed}"
        self._lock = Lock()

    @property
    def found(self) -> Found:
        """What becomes of which tensor."""
        with self._lock:  # threads read side by side
            return self._found

    @cached_property
    def _found(self) -> Found:
        return self._find()

    def prove(self) -> None:
        """Find it now, where it is not known yet. Raises Unsupported."""
        _ = self.found

    def describe(self) -> dict[str, Any]:
        """For the report."""
        added = self.source.entries.keys() - self.original.entries.keys()
        untied_bytes = sum(self.source.spec(tensor).size_bytes for tensor in added)
        return {"seed": self.seed, "untied_bytes": untied_bytes, **self.found.describe()}

    def turned(self, tensor: str, w: Tensor, apart: bool = False) -> Tensor:
        """A tensor, some of its leading dimension, or where it is `apart` a linear [out, in] that lies in it."""
        steps, transposed = self.found.steps.get(tensor, TensorSteps(()))
        return apply(w, steps, transposed and not apart, self.source.read) if steps else w


def apply(w: Tensor, steps: Sequence[Step], transposed: bool, read: Read) -> Tensor:
    """The tensor after all steps, as it lies."""
    w = w.float()
    w = w.transpose(IN, OUT) if transposed else w
    for step in steps:
        w = step.apply(w, read)
    return (w.transpose(IN, OUT) if transposed else w).contiguous()
