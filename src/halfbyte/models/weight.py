"""The matrices that a method may quantize."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.grids.grid import Shape
from halfbyte.models import roles

if TYPE_CHECKING:
    from halfbyte.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weight:
    """One matrix that a method may quantize: a 2-D tensor, or one expert of a 3-D tensor."""

    name: str
    """The module in the output: the tensor's name without `.weight`, with the expert's number where experts are
    fused."""
    tensor: str
    block: str | None
    shape: Shape
    """[out, in], whichever way it lies in the file."""
    transposed: bool = False
    expert: int | None = None
    row_offset: int | None = None
    """Of a chunk of rows: the first of them."""


def weights_of(checkpoint: "Checkpoint", embedding: bool = False) -> Iterator[Weight]:
    """Those inside the blocks, the head, and the embedding if asked for."""
    lies_transposed = checkpoint.linears.transposed
    for name, shape in checkpoint.tensors().items():
        if name in checkpoint.expert_slices:
            yield Weight(name.removesuffix(".weight"), name, roles.block_of(name), shape)
            continue
        if name not in lies_transposed:
            outside = roles.block_of(name) is None and len(shape) == 2
            if outside and (
                (roles.is_head(name) and not checkpoint.tied) or (embedding and roles.EMBEDDING.match(name))
            ):
                yield Weight(name.removesuffix(".weight"), name, None, shape)
            continue
        block, transposed = roles.block_of(name, checkpoint.has_encoder), lies_transposed[name]
        out, width = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        if len(shape) == 2:
            yield Weight(name.removesuffix(".weight"), name, block, (out, width), transposed)
        else:
            head, _, last = name.removesuffix(".weight").rpartition(".")
            for expert in range(shape[0]):
                yield Weight(f"{head}.{expert}.{last}", name, block, (out, width), transposed, expert)
