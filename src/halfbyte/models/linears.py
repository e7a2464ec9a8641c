"""Which tensors of a checkpoint are linears, and how they lie.

Names tell it of the well-known families. Of all others the modules are asked that read the tensors: what is no linear's
weight and no stack of experts (a recurrence's gates, a table of positions) is not to be rounded, whatever its shape.
"""

from typing import TYPE_CHECKING, NamedTuple

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.models import roles

if TYPE_CHECKING:
    from halfbyte.models.checkpoint import Checkpoint


BY_NAME = "which matrices are linears was told by their names and shapes alone"


class Linears(NamedTuple):
    """What is known of the matrices in a checkpoint's blocks."""

    transposed: dict[str, bool]
    """Of a linear's weight, or of a stack of the same of all experts: whether it lies [in, out]."""
    others: dict[str, str]
    """Tensors that have the shape of one and are none, with the reason."""
    unasked: str | None = None
    """Why names and shapes had to do, where the model's code should have been asked."""


def linears(checkpoint: "Checkpoint") -> Linears:
    """The linears of a checkpoint, told by their names, or where these are not ordinary, by the model's modules."""
    candidates = _candidates(checkpoint)
    by_name = {name: roles.is_transposed(name, checkpoint.model_type) for name in candidates}
    if all(map(roles.ORDINARY.search, candidates)) and not checkpoint.has_encoder:
        return Linears(by_name, {})
    from halfbyte.models import modules, skeleton  # Transformers takes seconds to import

    try:
        model = skeleton.outline(checkpoint)
    except (BadCheckpoint, Unsupported) as error:
        return Linears(by_name, {}, f"{BY_NAME}: {error}")
    asked = modules.ask(model, candidates)
    return (
        asked
        if asked.transposed
        else Linears(
            by_name,
            {},
            f"{BY_NAME}: Transformers' {type(model).__name__} knows none, such as '{next(iter(candidates))}'",
        )
    )


def _candidates(checkpoint: "Checkpoint") -> dict[str, Shape]:
    """Tensors that may be linears, or stacks of such, by name and shape."""
    candidates: dict[str, Shape] = {}
    for name, shape in checkpoint.tensors().items():
        block = roles.block_of(name, checkpoint.has_encoder)
        if block is None or roles.KEPT.search(name) or name.endswith("bias"):
            continue
        if predicts_ahead(checkpoint, name):
            continue
        if len(shape) in (2, 3) and min(shape[-2:]) >= roles.SMALLEST:
            candidates[name] = shape
    return candidates


def predicts_ahead(checkpoint: "Checkpoint", tensor: str) -> bool:
    """Whether it is of multi-token prediction: called so, or in a layer beyond those that the model has."""
    layers = checkpoint.text_config.get("num_hidden_layers", checkpoint.text_config.get("n_layer"))
    block = None if checkpoint.has_encoder else roles.block_of(tensor)
    is_beyond = block is not None and isinstance(layers, int) and int(block.rpartition(".")[2]) >= layers
    return is_beyond or bool(roles.AHEAD.search(tensor))
