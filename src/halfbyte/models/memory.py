"""What a pass takes of a device's memory, from shapes alone: whether a model fits is known before it is read."""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.solvers.statistics import Statistics

FITTING = 8
"""Copies of a matrix in float32 while its grid is fitted and its codes are chosen: the matrix, what an error in it
counts, errors so far, and what a search for scales compares."""
RUNNING = 6
"""Copies of the widest tensor that a block computes of a batch, in its own dtype: what a gated MLP multiplies, or
queries, keys and values."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes, part by part: at most so many of each at any time."""

    outside: int
    """What comes before the blocks, which is there with the first of them and without hidden states of all samples."""
    block: int
    hidden: int
    """Of all batches that are kept on the device, or of one."""
    statistics: int
    """Of as many weights at a time as the budget holds."""
    running: int
    """What a block computes of a batch."""
    solving: int
    """The factor of the largest Hessian, the largest matrix while it is solved, and the codes of a block."""

    @property
    def total(self) -> int:
        """The most at one time: at the beginning, as statistics are collected, or as a matrix is solved."""
        collecting = self.hidden + self.statistics + self.running
        return self.block + max(
            self.outside + self.hidden + self.running, collecting, self.hidden + self.statistics + self.solving
        )


def device_memory(
    checkpoint: Checkpoint, samples: int, length: int, placement: Placement, full_precision: bool = False
) -> DeviceMemory:
    """Of quantizing with calibration on so many samples. Weights that read one tensor share a statistic, which shapes
    do not tell: each is counted."""
    itemsize = checkpoint.dtype.itemsize
    blocks: dict[str | None, list[tuple[int, ...]]] = defaultdict(list)
    for tensor, shape in checkpoint.tensors().items():
        blocks[roles.block_of(tensor)].append(shape)
    weights = [weight for weight in checkpoint.weights() if weight.block]
    by_block: dict[str | None, list[tuple[int, ...]]] = defaultdict(list)
    for weight in weights:
        by_block[weight.block].append(weight.shape)
    width = checkpoint.text_config["hidden_size"]
    batch = max(1, placement.batch_tokens // length) * length
    streams = 3 if full_precision else 1
    hidden = samples * length * width * itemsize * streams
    on_device = hidden if placement.of_hidden(hidden) == "device" else 0
    statistics = max(
        sum(Statistics.size_bytes(shape[1], full_precision) for shape in shapes) for shapes in by_block.values()
    )
    largest = max(Statistics.size_bytes(weight.shape[1], full_precision) for weight in weights)
    widest = max(max(weight.shape) for weight in weights)
    matrix = max(prod(weight.shape) for weight in weights)
    codes = max(sum(map(prod, shapes)) for shapes in by_block.values())
    return DeviceMemory(
        outside=sum(map(prod, blocks[None])) * itemsize,
        block=max(sum(map(prod, shapes)) for block, shapes in blocks.items() if block) * itemsize,
        hidden=on_device + batch * width * itemsize * 2,
        statistics=min(statistics, max(placement.statistics_bytes, largest)),
        running=batch * widest * (RUNNING * itemsize + 4),  # what statistics are made of is in float32
        solving=Statistics.size_bytes(max(weight.shape[1] for weight in weights)) + FITTING * 4 * matrix + 2 * codes,
    )
