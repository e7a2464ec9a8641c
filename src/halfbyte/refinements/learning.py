"""Rounding and scales learned by gradients through the block, so that it returns what it returned before anything was
quantized (SignRound, Cheng et al., 2309.05516; TesseraQ, Li and Panda, 2410.19103).

A weight may go from the level that the solver gave it to the next one, up or down. What decides is a lean between
-1 and 1, which starts towards where the weight was and is learned; likewise a factor of each scale and minimum. What
the block computes with is what a file stores of them, and gradients go straight through the rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from halfbyte.block_solvers import BlockTask, Solution
from halfbyte.grids.grid import Params, SteppedGrid
from halfbyte.grids.quantized import Quantized
from halfbyte.models.weight import Weight
from halfbyte.solvers.statistics import FEWEST_TOKENS

STEPS = 200
RATE, LINE_RATE = 0.02, 0.001
"""By how much a step moves a lean, and a scale or minimum of itself: at first; at last by nothing."""
START = 0.5
"""Leans begin so much of the way from the level to where the weight was: nearer to the border, too many would go over
with the first steps."""
PART = 1 << 16
"""Weights that are worked on at a time: what is computed of them stays in a core's cache."""
ALL = slice(None)
TOLD = 10
"""Steps between two lines of progress."""
SEED = 0
DECAYS = 0.9, 0.99
"""Of Adam's means of gradients and of their squares."""


class Adam:
    """Moves numbers by about a rate each, whatever the size of gradients (Kingma and Ba, 1412.6980)."""

    def __init__(self, numbers: Tensor):
        self.numbers, self.mean, self.square = numbers, torch.zeros_like(numbers), torch.zeros_like(numbers)

    def step(self, gradient: Tensor, rate: float, number: int, rows: slice = ALL) -> None:
        """Of some of them, the step of this number, counted from 1. Those that never had a gradient stay."""
        first, second = DECAYS
        mean, square = self.mean[rows].lerp_(gradient, 1 - first), self.square[rows]
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        ratio = (1 - second**number) ** 0.5 / (1 - first**number)
        self.numbers[rows].addcdiv_(mean, square.sqrt().clamp_(min=1e-30), value=-rate * ratio)


class Learned:
    """A matrix of which rounding and scales are learned; all by groups that share a scale."""

    def __init__(self, q: Quantized, grid: SteppedGrid, w: Float[Tensor, "out in"]):
        self.q, self.grid = q, grid
        self.levels = grid.ladder.levels.to(w.device)
        self.spacing = step if ((step := self.levels.diff()) == step[0]).all() else None
        self.rank = grid.ladder.ranks.to(w.device)[grid.grouped(q.codes).int()]
        self.first = self.lines = grid.lines(q.params)
        self.leans = Adam(torch.empty(self.rank.shape, device=w.device))
        for rows, target in self._parts(grid.grouped(w)):
            self.leans.numbers[rows] = self._towards(target.float(), rows)
        self.scales = Adam(torch.ones_like(self.first.scale))
        self.offsets = Adam(torch.ones_like(self.first.scale)) if self.first.offset is not None else None

    def _parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of groups, as many at a time as a core's cache holds."""
        per_part = max(1, PART // x[0].numel())
        for first in range(0, len(x), per_part):
            rows = slice(first, first + per_part)
            yield rows, x[rows]

    def _towards(self, w: Float32[Tensor, "rows groups size"], rows: slice) -> Float32[Tensor, "rows groups size"]:
        """Leans to begin with."""
        scale, zero, offset = self.first.each(rows)
        level = (w if offset is None else w - offset) / torch.where(scale == 0, torch.inf, scale)
        here = self.rank[rows].int()
        way = (level if zero is None else level + zero) - self.levels[here]
        step = self.levels[(here + way.sign().int()).clamp_(0, len(self.levels) - 1)] - self.levels[here]
        return torch.where(step == 0, 0.0, START * way.abs() / step).clamp_(-0.49, 0.49)

    def _ranks(self, rows: slice = ALL) -> Float32[Tensor, "rows groups size"]:
        return self.leans.numbers[rows].round().add_(self.rank[rows]).clamp_(0, len(self.levels) - 1)

    @property
    def params(self) -> Params:
        """Those that a file holds which are nearest to what was learned."""
        offset = None if self.first.offset is None or self.offsets is None else self.first.offset * self.offsets.numbers
        return self.grid.with_lines(self.q.params, self.first.scale * self.scales.numbers, offset)

    def quantized(self) -> Quantized:
        """What has been learned."""
        codes = self.grid.ladder.codes.to(self.rank.device)[self._ranks().int()]
        return self.q._replace(codes=self.grid.ungrouped(codes, self.q.shape), params=self.params)

    def decode(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """What the weights are by now."""
        self.lines = self.grid.lines(self.params)
        value = torch.empty(self.rank.shape, dtype=dtype, device=self.rank.device)
        for rows, part in self._parts(value):
            scale, zero, offset = self.lines.each(rows)
            level = self._ranks(rows)
            if self.spacing is None:
                level = self.levels[level.int()]
            else:
                level.mul_(self.spacing[0]).add_(self.levels[0])
            level = (level if zero is None else level.sub_(zero)).mul_(scale)
            part.copy_(level if offset is None else level.add_(offset))
        return self.grid.ungrouped(value, self.q.shape)

    def step(self, gradient: Float[Tensor, "out in"], value: Float[Tensor, "out in"], number: int) -> None:
        """Go a step against the gradient at what the weights are; steps are counted from 1."""
        share = 1 - (number - 1) / STEPS
        of_scales, of_offsets = torch.empty_like(self.first.scale), torch.empty_like(self.first.scale)
        values = self.grid.grouped(value)
        for rows, part in self._parts(self.grid.grouped(gradient)):
            g = part.float()
            of_scales[rows] = (values[rows].float() * g).sum(-1)
            of_offsets[rows] = g.sum(-1)
            self.leans.step(g.mul_(self.first.scale[rows, :, None].sign()), share * RATE, number, rows)
            self.leans.numbers[rows].clamp_(-1, 1)
        if self.offsets is not None and self.lines.offset is not None:
            of_offsets.mul_(self.lines.offset)
            of_scales.sub_(of_offsets)
            self.offsets.step(of_offsets, share * LINE_RATE, number)
        self.scales.step(of_scales, share * LINE_RATE, number)


class BlockTraining:
    """A block that computes with what is being learned, while it is."""

    def __init__(self, task: BlockTask, solutions: Sequence[Solution]):
        self.task, self.block, self.walk = task, task.block, task.walk
        self.targets, self.batches = task.targets, list(task.batches)
        self.solutions = solutions
        self.matrices: dict[int, Learned] = {}
        self.skipped: dict[int, str] = {}
        for number, solution in enumerate(solutions):
            grid = solution.q.grid
            if not isinstance(grid, SteppedGrid):
                self.skipped[number] = f"not learned: {grid} rounds {grid.vector_size} weights jointly"
            elif solution.tokens < FEWEST_TOKENS:
                self.skipped[number] = "not learned: too few calibration tokens reached it"
            else:
                w = torch.cat([self.block.target(weight) for weight in solution.weights])
                self.matrices[number] = Learned(solution.q, grid, w)
        self.weights = [weight for number in self.matrices for weight in solutions[number].weights]

    def run(self) -> list[Solution]:
        """The solutions, with better ones in the place of those that could be learned, if there are."""
        if not self.matrices:
            return self._noted({}, "")
        with self.block.trial(*{weight.tensor for weight in self.block.weights}):
            for weight in self.block.scales.weights:  # those that stay in 16 bits, with the scales of folds
                self.block.put(weight, self.block.target(weight))
            for solution in self.solutions:
                self._put(solution, solution.q.decode())
            before = self._missed()
            for number, batch in enumerate(self._order(), 1):
                self._step(batch, number)
            learned = {number: matrix.quantized() for number, matrix in self.matrices.items()}
            for number, q in learned.items():
                self._put(self.solutions[number], q.decode())
            better = self._missed() < before
        if not better:
            return self._noted({}, "not learned: the block misses by less as it was rounded")
        return self._noted(learned, "")

    def _noted(self, learned: Mapping[int, Quantized], remark: str) -> list[Solution]:
        """Solutions with what was learned in its place, and else with the reason why not."""
        noted = []
        for number, solution in enumerate(self.solutions):
            if number in learned:
                noted.append(solution._replace(q=learned[number], errors=None))
                continue
            said = remark or self.skipped.get(number, "")
            noted.append(solution._replace(note="; ".join(filter(None, (solution.note, said)))))
        return noted

    def _order(self) -> Iterator[int]:
        """All batches in turn, shuffled each time."""
        generator, done = torch.Generator().manual_seed(SEED), 0
        while True:
            for number in torch.randperm(len(self.batches), generator=generator).tolist():
                if done == STEPS:
                    return
                if done % TOLD == 0:
                    self._tell(done)
                yield self.batches[number]
                done += 1

    def _tell(self, done: int) -> None:
        number, count = self.walk.blocks.index(self.block), len(self.walk.blocks)
        self.walk.progress(f"{self.block.name}: learning, step {done} of {STEPS}", number + done / STEPS, count)

    def _step(self, batch: int, number: int) -> None:
        values = {}
        for which, matrix in self.matrices.items():
            weights = self.solutions[which].weights
            values[which] = matrix.decode(self.block.weight(weights[0]).dtype)
            self._put(self.solutions[which], values[which])
        _, gradients = self.walk.fitting(partial(self._error, batch, self.weights))
        taken = iter(gradients)
        for which, matrix in self.matrices.items():
            parts = [next(taken) for _ in self.solutions[which].weights]
            matrix.step(parts[0] if len(parts) == 1 else torch.cat(parts), values.pop(which), number)

    def _put(self, solution: Solution, values: Float[Tensor, "out in"]) -> None:
        parts = values.split([weight.shape[0] for weight in solution.weights])
        for weight, value in zip(solution.weights, parts, strict=True):
            self.block.put(weight, value)

    def _error(self, batch: int, weights: Sequence[Weight] = ()) -> tuple[float, list[Tensor]]:
        return self.block.error(weights, self.task.inputs[batch], self.targets[batch], batch)

    def _missed(self) -> float:
        """The mean over all batches."""
        return sum(self.walk.fitting(partial(self._error, batch))[0] for batch in self.batches)


def learned(task: BlockTask, solutions: Sequence[Solution]) -> list[Solution]:
    """Solutions with which the block misses by less what it returned; the solver's own, if none are found."""
    return BlockTraining(task, solutions).run()
