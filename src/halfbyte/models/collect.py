"""Statistics of what the linears of a block read: a function of the block and its inputs, all at once or in parts."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor

from halfbyte.models.block import Block
from halfbyte.models.matmuls import Matrix
from halfbyte.models.streams import Stream
from halfbyte.models.weight import Weight
from halfbyte.solvers.statistics import Statistics


def collect(
    block: Block,
    wanted: Collection[Weight],
    inputs: Stream,
    full_inputs: Stream | None = None,
    full_outputs: Stream | None = None,
    batches: Iterable[int] | None = None,
) -> dict[Weight, Statistics]:
    """One statistic for each group with a wanted weight. Weights that no token reaches, such as idle experts, get none.

    With `full_inputs`, what the block would read if nothing had been quantized, `Statistics.drift` is known too, and
    what the block makes of them is put into `full_outputs`. Only that stream is changed. `batches`: all to calibrate on
    by default.
    """
    collector = _Collector(block, set(wanted))
    for batch in block.walk.batches.calibrating if batches is None else batches:
        if full_inputs is not None:
            collector.originals.clear()
            outputs = block.observe(collector.note_original, [batch], full_inputs)[0]
            if full_outputs is not None:
                full_outputs[batch] = outputs
        block.observe(collector.add, [batch], inputs)
    return {weight: s for weight, s in collector.statistics.items() if s.tokens}


class _Collector:
    """Adds what matrices read to the statistics of their groups."""

    def __init__(self, block: Block, wanted: set[Weight]):
        self.wanted, self.device = wanted, block.walk.device
        self.statistics: dict[Weight, Statistics] = {}
        self.leaders: dict[Weight, Weight] = {}
        """Of a group, the first weight, whose reading counts: all of them read the same."""
        self.originals: dict[Weight, Tensor] = {}
        """What leaders read of a batch in the full-precision model."""
        for group in block.groups():
            self._join(group)

    def _first(self, matrices: list[Matrix]) -> Weight | None:
        return next((m.weight for m in matrices if m.weight and m.weight in self.wanted), None)

    def _join(self, matrices: list[Matrix]) -> None:
        weights = [m.weight for m in matrices if m.weight and m.weight in self.wanted]
        if weights:
            shared = self.statistics.get(weights[0]) or Statistics(weights[0].shape[1], self.device)
            self.statistics.update(dict.fromkeys(weights, shared))
            self.leaders.update(dict.fromkeys(weights, weights[0]))

    def note_original(self, matrices: list[Matrix], x: Tensor) -> None:
        weight = self._first(matrices)
        if weight is not None and self.leaders.get(weight, weight) == weight:
            self.originals[weight] = x

    def add(self, matrices: list[Matrix], x: Tensor) -> None:
        weight = self._first(matrices)
        if weight is None:
            return
        if weight not in self.leaders:  # an expert that the probe did not reach
            self._join(matrices)
        if self.leaders[weight] == weight:
            original = self.originals.pop(weight, None)
            # Where quantization sends a token to another expert, the two streams cannot be compared.
            self.statistics[weight].add(x, original if original is not None and original.shape == x.shape else None)


def reading_groups(block: Block, fused_groups: Iterable[Sequence[Weight]]) -> list[list[Weight]]:
    """The weights of fused groups, those together that read the same tensor, and so have one statistic."""
    wanted = {weight: group for group in fused_groups for weight in group}
    groups: list[list[Weight]] = []
    for matrices in block.groups():
        weights = [m.weight for m in matrices if m.weight and m.weight in wanted]
        if weights:
            groups.append(weights)
            wanted = {weight: group for weight, group in wanted.items() if weight not in weights}
    unreached: dict[tuple[Weight, ...], list[Weight]] = {}  # experts that the probe did not reach
    for weight, group in wanted.items():
        unreached.setdefault(tuple(group), []).append(weight)
    return groups + list(unreached.values())


def in_parts(groups: Iterable[list[Weight]], budget_bytes: int, drift: bool = False) -> Iterator[set[Weight]]:
    """Weights, as many at a time as have Hessians within a budget, and one group at least.

    Statistics are sums over the same tokens in the same order whatever they are collected with: parts change no bit of
    them.
    """
    part: set[Weight] = set()
    taken = 0
    for group in groups:
        size = Statistics.size_bytes(group[0].shape[1], drift)
        if part and taken + size > budget_bytes:
            yield part
            part, taken = set(), 0
        part.update(group)
        taken += size
    if part:
        yield part
