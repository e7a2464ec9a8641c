"""A matrix that is whole and of another size than config.json's model has: half of the rows, with half of the scales.

Its tensors agree with each other, so only the model's code tells. That takes seconds to import, and is asked where
layers differ from each other or from the hidden size, as those of few models do.
"""

import re
from collections import Counter
from collections.abc import Iterator

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.models.checkpoint import Checkpoint


def require(checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint for a linear that is of another size than Transformers' model has it. Of models unknown
    there, nothing is said."""
    odd = set(_odd(checkpoint))
    if not odd:
        return
    from halfbyte.models import filling, mapping, skeleton

    try:
        model = skeleton.outline(checkpoint)
    except (BadCheckpoint, Unsupported):
        return
    shapes = checkpoint.tensors()
    weight_map = mapping.places(model, shapes)
    filled = Counter(place.parameter for place in weight_map.values())
    for tensor in sorted(odd & weight_map.keys()):
        place = weight_map[tensor]
        expected = tuple(filling.tensor(model, place.parameter).shape)
        whole = filled[place.parameter] == 1 and place == mapping.ParamView(
            place.parameter
        )  # and no part of what Transformers fuses
        if whole and shapes[tensor] != expected:
            its = f"{type(model).__name__} has it as {list(expected)}"
            raise BadCheckpoint(
                f"tensor '{tensor}' is {list(shapes[tensor])}, and {its}; it is not whole, or config.json is of "
                "another model"
            )


def _odd(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors that have not one shape in all layers, or no side of the hidden size."""
    kinds: dict[str, dict[str, Shape]] = {}
    for weight in checkpoint.weights():
        if weight.block and weight.expert is None:
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", weight.tensor), {})[weight.tensor] = weight.shape
    hidden = checkpoint.config.get("hidden_size")
    for layers in kinds.values():
        if len(set(layers.values())) > 1 or (hidden and hidden not in next(iter(layers.values()))):
            yield from layers
