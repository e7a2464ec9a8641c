"""Solvers of whole blocks: they see a block, what it reads, and what it returns in the full-precision model.

`per_matrix` makes one of a solver that sees a matrix and the statistics of its inputs. To add another: one file, and
one line in `BLOCK_SOLVERS`. What starts from what a solver has rounded is in `halfbyte.refinements`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.devices import HELD_BYTES, release
from halfbyte.grids.activations import ActivationStats
from halfbyte.grids.grid import Grid
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.models.block import Block
from halfbyte.models.collect import collect, in_parts, reading_groups
from halfbyte.models.streams import Stream
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.recipe import Method
from halfbyte.solvers import SOLVERS, solved
from halfbyte.solvers.outputs import OutputHessian
from halfbyte.solvers.statistics import FEWEST_TOKENS, NotPositive, Statistics

SAMPLED = 1 << 16
"""Values of what a weight reads that are kept for the report."""


UNGUIDED = "too few calibration tokens reached it to tell how its outputs count"


class Solution(NamedTuple):
    """What a fused group becomes."""

    weights: Sequence[Weight]
    q: Quantized
    """All rows of them, one below the other."""
    errors: Sequence[float] | None = None
    """Relative errors of the outputs of each, where they are known."""
    tokens: int = 0
    """How many a solver went by."""
    note: str = ""


@dataclass
class BlockTask:
    """One block to quantize, and what is known of it."""

    walk: Walk
    block: Block
    """As the original has it, but for scales that transforms have moved."""
    fused_groups: Sequence[Sequence[Weight]]
    """Weights that are rounded as one matrix, most of them alone."""
    schemes: Mapping[Weight, Scheme]
    statistics: dict[Weight, Statistics] | None = None
    """Of all weights at once, where transforms had to see them."""
    seen: dict[Weight, ActivationStats] = field(default_factory=dict)
    """What weights with rounded activations read, as far as it was collected."""
    sampled: dict[Weight, ActivationStats] = field(default_factory=dict)
    """What all weights read, with a few tokens of it: those that read the same share one."""
    outputs: Mapping[Weight, OutputHessian] = field(default_factory=dict)
    """What errors at the outputs of weights cost, of a method that asks for it (`Method.guided`)."""

    @property
    def inputs(self) -> Stream:
        """What the block reads after the blocks before it were quantized, batch by batch."""
        return self.walk.inputs

    @property
    def targets(self) -> Stream:
        """What the block returns in the full-precision model: of a method that asks for it
        (`Method.full_precision`)."""
        self.walk.run_full_precision(self.block)
        if self.walk.full_outputs is None:
            raise ValueError("the method does not say that it needs the full-precision model (Method.full_precision)")
        return self.walk.full_outputs

    @property
    def batches(self) -> Iterable[int]:
        """Numbers of those to calibrate on."""
        return self.walk.batches.calibrating

    def output_hessian(self, weights: Sequence[Weight]) -> OutputHessian | None:
        """That of weights one below the other, with the scales that folds have moved; None where too little is
        known."""
        found = [self.outputs[weight] for weight in weights if weight in self.outputs]
        if len(found) < len(weights):
            return None
        rows = self.block.scales.rows
        return OutputHessian.joined(
            [o.divided(rows[weight]) if weight in rows else o for o, weight in zip(found, weights, strict=True)]
        )

    def collect_all(self) -> dict[Weight, Statistics]:
        """Statistics of all weights at once; those beyond a device's budget wait in the host's memory."""
        collected: dict[Weight, Statistics] = {}
        for wanted in [set(self.schemes)] if self.walk.placement.is_host else self._in_parts():
            for statistics in collected.values():
                statistics.leave_device()
            collected |= self._collected(wanted)
        self.statistics = collected
        return collected

    def _in_parts(self) -> Iterator[set[Weight]]:
        """Weights, as many at a time as have statistics within the budget."""
        groups = reading_groups(self.block, self.fused_groups)
        return in_parts(groups, self.walk.placement.statistics_bytes, self.walk.full_inputs is not None)

    def parts(self) -> Iterator[tuple[list[Sequence[Weight]], dict[Weight, Statistics]]]:
        """Fused groups with the statistics of their weights, as many at a time as the memory's budget holds."""
        if self.statistics is not None:
            self._note_seen(self.statistics)
            yield list(self.fused_groups), self.statistics
            return
        for wanted in self._in_parts():
            statistics = self._collected(wanted)
            self._note_seen(statistics)
            yield [group for group in self.fused_groups if group[0] in wanted], statistics

    def _note_seen(self, statistics: Mapping[Weight, Statistics]) -> None:
        seen = {id(s): s.activation_stats for w, s in statistics.items() if self.schemes[w].activations}
        self.seen |= {w: seen[id(s)] for w, s in statistics.items() if id(s) in seen}
        few = {id(s): s for s in statistics.values()}
        sampled = {key: s.sample(SAMPLED) for key, s in few.items()}
        self.sampled |= {w: sampled[id(s)] for w, s in statistics.items()}

    def _collected(self, wanted: Iterable[Weight]) -> dict[Weight, Statistics]:
        walk, wanted = self.walk, list(wanted)
        outputs = None
        if walk.full_inputs is not None and walk.full_outputs is None:
            outputs = walk.full_outputs = walk.full_inputs.fork()
        statistics = walk.fitting(lambda: collect(self.block, wanted, walk.inputs, walk.full_inputs, outputs))
        release(walk.device, HELD_BYTES)
        return statistics


BlockSolver = Callable[[BlockTask], Iterator[Solution]]
"""Yields a solution for each fused group. The block itself stays as it is until all are there."""


def per_matrix(method: Method) -> BlockSolver:
    """Every matrix by itself, by the statistics of what it reads."""

    def solve_block(task: BlockTask) -> Iterator[Solution]:
        for groups, statistics in task.parts():
            for weights in groups:
                group_statistics = statistics.get(weights[0])  # what is one matrix to engines reads one tensor
                for weight in weights:  # the last weight of a group frees its Hessian
                    statistics.pop(weight, None)
                yield _solution(task, weights, group_statistics, method)
                del group_statistics  # not beside the next one

    return solve_block


def _solution(task: BlockTask, weights: Sequence[Weight], statistics: Statistics | None, method: Method) -> Solution:
    """What a fused group becomes by the statistics of what it reads."""
    targets = [task.block.target(weight) for weight in weights]
    w = targets[0] if len(targets) == 1 else torch.cat(targets)
    outputs = task.output_hessian(weights) if method.guided else None
    q, note = task.walk.fitting(partial(solve_matrix, w, task.schemes[weights[0]].weight, statistics, method, outputs))
    if statistics is None:
        return Solution(weights, q, note=note)
    decoded = q.decode().split([w.shape[0] for w in weights])
    errors = [statistics.error(w, rounded) for w, rounded in zip(targets, decoded, strict=True)]
    return Solution(weights, q, errors, statistics.tokens, note)


def solve_matrix(
    w: Tensor, grid: Grid, statistics: Statistics | None, method: Method, outputs: OutputHessian | None = None
) -> tuple[Quantized, str]:
    """The solver's answer, or that of `nearest` and the reason."""
    if not method.calibrated:  # the text is there for stored scales of activations
        return SOLVERS[method.solver](w, grid, None), ""
    if statistics is None:
        reason = "no calibration token reached it"
    elif statistics.tokens < FEWEST_TOKENS:
        reason = f"only {statistics.tokens} calibration tokens reached it"
    else:
        try:
            q = solved(method.solver, method.refinements, w, grid, statistics, outputs)
            return q, UNGUIDED if method.guided and outputs is None else ""
        except NotPositive:
            reason = "its Hessian could not be factored"
    return SOLVERS["nearest"](w, grid, None), f"{reason}: rounded to nearest"


BLOCK_SOLVERS: dict[str, BlockSolver] = {}
"""Those that are no solvers of single matrices, by their names in `halfbyte.recipe.PARTS`."""
