"""What a pass takes of a device's memory, from shapes alone: whether a model fits is known before it is read."""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod

from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.weight import Weight
from halfbyte.names import fused_set
from halfbyte.solvers.statistics import Statistics

FITTING = 32
"""Bytes of a weight while its grid is fitted and its codes are chosen: eight copies in float32, such as what an error
in it counts, errors so far, and what a search for scales compares."""
LOGITS_BYTES = 256e6
"""Of predictions in memory as a model is gone back through."""
GUIDING_TOKENS = 1 << 15
"""That are gone back through at most, to see what outputs count for."""
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
    least: int
    """What no smaller batch and no budget makes less: a block, and the largest Hessian with its factor; or what comes
    before the blocks."""
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
    """Of quantizing with calibration on so many samples. Weights that read one tensor share a statistic, as far as
    their names tell."""
    itemsize = checkpoint.dtype.itemsize
    blocks: dict[str | None, list[tuple[int, ...]]] = defaultdict(list)
    for tensor, shape in checkpoint.tensors().items():
        blocks[roles.block_of(tensor)].append(shape)
    weights = [weight for weight in checkpoint.weights() if weight.block]
    by_block: dict[str | None, list[tuple[int, ...]]] = defaultdict(list)
    read: dict[str | None, dict[object, int]] = defaultdict(dict)
    for weight in weights:
        by_block[weight.block].append(weight.shape)
        read[weight.block][reading_group(weight)] = Statistics.size_bytes(weight.shape[1], full_precision)
    width = hidden_size(checkpoint)
    batch = min(samples, max(1, placement.batch_tokens // length)) * length
    hidden = hidden_bytes(checkpoint, samples, length, full_precision)
    on_device = hidden if placement.of_hidden(hidden) == "device" else 0
    statistics = max((sum(groups.values()) for groups in read.values()), default=0)
    block = max((sum(map(prod, shapes)) for name, shapes in blocks.items() if name), default=0) * itemsize
    largest = max((Statistics.size_bytes(weight.shape[1], full_precision) for weight in weights), default=0)
    widest = max((max(weight.shape) for weight in weights), default=width)
    matrix = max((prod(weight.shape) for weight in weights), default=0)
    codes = max((sum(map(prod, shapes)) for shapes in by_block.values()), default=0)
    inputs = max((weight.shape[1] for weight in weights), default=0)
    outside = sum(map(prod, blocks[None])) * itemsize
    return DeviceMemory(
        outside=outside,
        block=block,
        hidden=on_device + batch * width * itemsize * 2,
        statistics=min(statistics, max(placement.statistics_bytes, largest)),
        running=batch * widest * (RUNNING * itemsize + 4),  # what statistics are made of is in float32
        least=max(outside, block + 2 * largest),
        solving=Statistics.size_bytes(inputs) + FITTING * matrix + 2 * codes,
    )


def hidden_size(checkpoint: Checkpoint) -> int:
    """Features of a hidden state; where config.json does not say in a usual word, what most matrices read."""
    configured = (checkpoint.text_config.get(name) for name in ("hidden_size", "n_embd", "d_model"))
    widths = Counter(weight.shape[1] for weight in checkpoint.weights())
    return next((n for n in configured if isinstance(n, int)), max(widths, key=widths.__getitem__, default=0))


def hidden_bytes(checkpoint: Checkpoint, samples: int, length: int, full_precision: bool = False) -> int:
    """Of what so many samples make between two blocks; in full precision too, of what a block reads and returns."""
    of_token = hidden_size(checkpoint) * checkpoint.dtype.itemsize
    return samples * length * of_token * (3 if full_precision else 1)


def guiding_tokens(samples: int, length: int) -> int:
    """Of all, those that are gone back through: evenly chosen windows."""
    return len(range(0, samples, guiding_stride(samples, length))) * length


def guiding_stride(samples: int, length: int) -> int:
    """Of how many windows one is gone back through."""
    return max(1, -(-samples * length // GUIDING_TOKENS))


def reading_group(weight: Weight) -> Hashable:
    """The same for weights that read one tensor, as far as their names tell."""
    return fused_set(weight.name) or weight.name
