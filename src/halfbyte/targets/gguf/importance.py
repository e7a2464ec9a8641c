"""Importance matrices of llama.cpp for the weights of a checkpoint: measured here, or read from a file."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.errors import BadRequest
from halfbyte.models.calibrate import Samples
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.collect import collect, in_parts, reading_groups
from halfbyte.models.placement import Placement
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress, silent
from halfbyte.targets.gguf import imatrix
from halfbyte.targets.gguf.imatrix import Importance, Squares
from halfbyte.targets.gguf.source import name_map_of


def measure(
    checkpoint: Checkpoint, samples: Samples, progress: Progress = silent, placement: Placement | None = None
) -> Importance:
    """Mean squares of the inputs of every matrix of the unquantized model, experts in stacks: what llama-imatrix
    measures."""
    names = _names(checkpoint, checkpoint.weights())
    sums: dict[str, dict[int, tuple[Tensor, int]]] = {}
    walk = Walk(checkpoint, samples.tokens, checkpoint.dtype, placement, to_the_end=False, progress=progress)
    for block in walk:
        groups = reading_groups(block, [[weight] for weight in block.weights])
        for wanted in in_parts(groups, walk.placement.statistics_bytes):
            collected = walk.fitting(partial(collect, block, wanted, walk.inputs))
            for weight, statistics in collected.items():
                for name, expert in names[weight]:
                    sums.setdefault(name, {})[expert] = statistics.hessian.diagonal().cpu().clone(), statistics.tokens
    experts = Counter(name for places in names.values() for name, _ in places)
    return Importance(
        {name: _stacked(by_expert, experts[name]) for name, by_expert in sums.items()},
        (samples.source,),
        *samples.tokens.shape,
    )


write = imatrix.write


def read(path: Path, checkpoint: Checkpoint, weights: Iterable[Weight]) -> dict[Weight, Float32[Tensor, " in"]]:
    """Mean squares by weight; matrices outside of the blocks may have none. Raises BadRequest for a matrix of another
    model."""
    matrix = imatrix.read(path)
    names = _names(checkpoint, weights)
    experts = Counter(name for places in names.values() for name, _ in places)
    inside = {name for weight, places in names.items() if weight.block for name, _ in places}
    if strange := next((name for name in matrix.tensors if name.startswith("blk.") and name not in inside), None):
        raise BadRequest(f"{path} is of another model: it knows {strange}, which {checkpoint.path} has not")
    mean_squares: dict[Weight, Tensor] = {}
    for weight, places in names.items():
        name, expert = places[0]
        means = matrix.of(name, experts[name], weight.shape[1])
        if means is not None:
            mean_squares[weight] = means[expert]
        elif weight.block:
            raise BadRequest(f"{path} is of another model: it knows nothing of {name}")
    return mean_squares


def _names(checkpoint: Checkpoint, weights: Iterable[Weight]) -> dict[Weight, list[tuple[str, int]]]:
    """GGUF tensor and number of expert of every weight that a GGUF has."""
    names = name_map_of(checkpoint)
    placed = {
        w: [(p.name, (p.expert if w.expert is None else w.expert) or 0) for p in names.mapped(w.tensor)]
        for w in weights
    }
    return {weight: places for weight, places in placed.items() if places}


def _stacked(by_expert: dict[int, tuple[Tensor, int]], experts: int) -> Squares:
    """Experts that no token has reached have sums and counts of zero."""
    width = next(iter(by_expert.values()))[0].numel()
    rows = [by_expert.get(expert, (torch.zeros(width), 0)) for expert in range(experts)]
    return Squares(torch.stack([row for row, _ in rows]), torch.tensor([float(count) for _, count in rows]))
