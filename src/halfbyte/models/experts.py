"""Experts that lie in one tensor, read one linear at a time under the names that engines know.

Engines look for gate, up and down of each expert when these are quantized. So a checkpoint that stacks them is read as
one that spells them apart, and what is written is the same from either.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from halfbyte.containers.safetensors import Entry
from halfbyte.grids.grid import Shape
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint


class ExpertSlice(NamedTuple):
    """One linear of one expert."""

    stack: str
    """The tensor that it lies in."""
    expert: int
    row_offset: int
    """Of its rows, in the expert's."""
    shape: Shape
    """[out, in]."""
    transposed: bool
    """Whether the stack is [experts, in, out]."""

    def read(self, stack: Entry) -> Tensor:
        """Its rows, [out, in], out of the stack."""
        matrix, last = stack.at(self.expert), self.row_offset + self.shape[0]
        return (
            matrix.read()[:, self.row_offset : last].T.contiguous()
            if self.transposed
            else matrix.read(self.row_offset, last)
        )


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, its experts apart wherever there are names for that."""
    if not checkpoint.splits_stacks:
        return checkpoint
    transposed, shapes = checkpoint.linears.transposed, checkpoint.tensors()
    stacks = [t for t in transposed if len(shapes[t]) == 3 and t in checkpoint.entries]
    parts = {t: roles.parts_of(t, checkpoint.model_type) for t in stacks}
    return _reading(
        checkpoint,
        {name: part for t in stacks for name, part in _slices(t, shapes[t], transposed[t], parts[t]).items()},
    )


def restacked(checkpoint: Checkpoint, stacks: set[str]) -> Checkpoint:
    """The checkpoint with these stacks whole again."""
    return _reading(
        checkpoint, {name: part for name, part in checkpoint.expert_slices.items() if part.stack not in stacks}
    )


def _slices(stack: str, shape: Shape, transposed: bool, parts: list[tuple[str, str]]) -> dict[str, ExpertSlice]:
    experts, out, width = (shape[0], shape[2], shape[1]) if transposed else shape
    return {
        f"{home}.{expert}.{part}.weight": ExpertSlice(
            stack, expert, out // len(parts) * number, (out // len(parts), width), transposed
        )
        for expert in range(experts)
        for number, (home, part) in enumerate(parts)
    }


def _reading(checkpoint: Checkpoint, slices: Mapping[str, ExpertSlice]) -> Checkpoint:
    return checkpoint.replaced(expert_slices=slices)
