"""What each weight costs on each grid: the KL divergence from the original, predicted from one pass back.

The divergence has no first-order term where nothing has changed, so it is half of the second-order one. Of a weight W
that becomes W + D it is, per token,

    1/2 E[<g, D>^2] / tokens,   g the gradient of the log-probability of a window whose tokens the model has drawn

(the Fisher information is the second derivative of the KL divergence). What rows of D miss is taken to be independent
of one another, so that <g, D>^2 is a sum over rows, and some of them are enough. D is what the run's own solver makes
of these rows, with the statistics of what the original reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from halfbyte.block_solvers import solve_matrix
from halfbyte.budget.ledger import Ledger
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.quantized import Scheme
from halfbyte.models import roles
from halfbyte.models.backward import Backward
from halfbyte.models.batches import Tokens
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.collect import collect, in_parts, reading_groups
from halfbyte.models.placement import Placement
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress, silent
from halfbyte.recipe import Method
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import Statistics

ROWS = 128
"""Of each weight, those that are rounded and multiplied."""
CHANGES_BYTES = 1e9
"""In memory at once, of a block."""
UNREAD_ROWS = 2048
"""Of a head, rows of tokens that the text has not."""

Wanted = Mapping[Weight, Mapping[str, Scheme]]
"""Schemes of each weight, by name."""


def missing(wanted: Wanted, ledger: Ledger) -> Wanted:
    """What the ledger does not know yet."""
    losses = ledger.losses
    return {
        w: left
        for w, schemes in wanted.items()
        if (left := {name: s for name, s in schemes.items() if name not in losses.get(w.name, {})})
    }


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    windows: Tokens,
    wanted: Wanted,
    method: Method,
    ledger: Ledger,
    placement: Placement | None = None,
    progress: Progress = silent,
) -> None:
    """Have the ledger know the loss of each scheme that is wanted of each weight. Raises HalfbyteError."""
    wanted = missing(wanted, ledger)
    if not wanted:
        return
    back = Backward(checkpoint, windows, placement, progress=progress)
    tokens = windows.numel()
    outside = [_Table.of(weight, schemes, back) for weight, schemes in wanted.items() if weight.block is None]
    for read, probabilities in back.predictions():
        for table in outside:
            if table.is_head:
                table.see_predictions(read, probabilities)
    for block in back:
        here = {weight: wanted[weight] for weight in block.weights if weight in wanted}
        for losses in _of_block(back, block, here, method, tokens) if here else ():
            ledger.add(losses)
    for table in outside:
        if table.is_embedding:
            for gradient in back.embedding(table.weight.tensor):
                table.see_gradient(gradient)
        ledger.add({table.weight.name: table.losses(tokens)})


class _Changes(NamedTuple):
    """Of some rows of a weight, what becomes of them on each grid."""

    weight: Weight
    rows: slice
    schemes: Mapping[str, Scheme]
    changes: Float32[Tensor, "schemes rows in"]
    moved: Float32[Tensor, "schemes rows"]
    """Mean square of what rounding what it reads changes in the outputs."""
    read: float
    """Mean square of what it reads, summed over in-features."""
    squares: Float32[Tensor, "schemes rows"]
    """Sum over windows of squares."""

    def add(self, gradient: Float32[Tensor, "out in"]) -> None:
        """See the gradient of a window."""
        row_gradients = gradient[self.rows].float()
        self.squares.add_(torch.einsum("ri,sri->sr", row_gradients, self.changes).square_())
        if self.read:
            self.squares.add_(self.moved * (row_gradients.square().sum(1) / self.read))

    def losses(self, tokens: int) -> dict[str, float]:
        """In nats per token, of all rows."""
        whole = self.weight.shape[0] / self.changes.shape[1]
        return dict(zip(self.schemes, (self.squares.sum(1) * (whole / (2 * tokens))).tolist(), strict=True))


def _of_block(
    back: Backward, block: Block, wanted: Wanted, method: Method, tokens: int
) -> Iterator[dict[str, dict[str, float]]]:
    held = sum(weight.shape[1] * len(schemes) for weight, schemes in wanted.items()) * 4
    rows = int(min(ROWS, max(8, CHANGES_BYTES / held)))
    groups = reading_groups(block, [[weight] for weight in wanted])
    changes: list[_Changes] = []
    for part in in_parts(groups, back.walk.placement.statistics_bytes):
        statistics = collect(block, part, back.walk.inputs)
        changes += [_changes(block, w, wanted[w], statistics.get(w), method, rows) for w in wanted if w in part]
    for batch in back.samples:
        gradients = back.through(block, batch, [change.weight for change in changes])
        for change, gradient in zip(changes, gradients, strict=True):
            change.add(gradient)
    yield {change.weight.name: change.losses(tokens) for change in changes}


def _changes(
    block: Block,
    weight: Weight,
    schemes: Mapping[str, Scheme],
    statistics: Statistics | None,
    method: Method,
    count: int,
) -> _Changes:
    rows = slice(None, None, -(-weight.shape[0] // count))
    w = block.weight(weight)[rows].contiguous()
    rounded = [solve_matrix(w, scheme.weight, statistics, method)[0].decode() for scheme in schemes.values()]
    moved = torch.zeros(len(schemes), len(w), device=w.device)
    read = 0.0
    if statistics is not None and any(scheme.activations for scheme in schemes.values()):
        read = float(statistics.importance.sum())
        for number, scheme in enumerate(schemes.values()):
            moved[number] = _moved(w.float(), scheme, statistics)
    return _Changes(weight, rows, schemes, torch.stack(rounded) - w.float(), moved, read, torch.zeros_like(moved))


def _moved(w: Tensor, scheme: Scheme, statistics: Statistics) -> Tensor:
    """Mean square of what each row makes of what rounding its input misses."""
    if scheme.activations is None:
        return torch.zeros(len(w), device=w.device)
    seen = statistics.activation_stats
    missed = ActivationQuant(scheme.activations, scheme.activations.fit(seen, "max")).round(seen.rows) - seen.rows
    return (missed @ w.T).square().mean(0)


@dataclass
class _Table:
    """An embedding, a head, or both in one: of rows that the text has, and some of the others."""

    weight: Weight
    schemes: Mapping[str, Scheme]
    rows: Int64[Tensor, " rows"]
    stands_for: Float32[Tensor, " rows"]
    """How many rows each stands for."""
    changes: Float32[Tensor, "schemes rows in"]
    is_embedding: bool
    is_head: bool
    squares: Float32[Tensor, " schemes"] = field(init=False)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(len(self.schemes), device=self.changes.device)

    @classmethod
    def of(cls, weight: Weight, schemes: Mapping[str, Scheme], back: Backward) -> "_Table":
        """Rounded to nearest, as whatever lies outside of the blocks is."""
        checkpoint, device = back.walk.checkpoint, back.walk.device
        is_embedding = bool(roles.EMBEDDING.match(weight.tensor))
        read = torch.cat([back.walk.batches[batch].flatten() for batch in back.samples]).unique()
        read = read[read < weight.shape[0]]
        others = torch.ones(weight.shape[0], dtype=torch.bool).index_fill_(0, read, False).nonzero()[:, 0]
        some = others[:: max(1, len(others) // UNREAD_ROWS)]
        rows = torch.cat([read, some])
        stands_for = torch.ones(len(rows), device=device)
        stands_for[len(read) :] = len(others) / max(1, len(some))
        w = checkpoint.read_weight(weight)[rows].to(device)
        changes = [SOLVERS["nearest"](w, s.weight, None).decode() - w.float() for s in schemes.values()]
        head = not is_embedding or checkpoint.tied
        return cls(weight, schemes, rows, stands_for, torch.stack(changes), is_embedding, head)

    def see_predictions(self, read: Tensor, probabilities: Tensor) -> None:
        """What the head reads and says of some tokens: the variance of each token's having been drawn is what a change
        of its logit costs."""
        row_probabilities = probabilities[:, self.rows.to(probabilities.device)]
        costs = row_probabilities.mul_(1 - row_probabilities).mul_(self.stands_for)
        for number, change in enumerate(self.changes):
            self.squares[number] += ((read.float() @ change.T).square_() * costs).sum()

    def see_gradient(self, gradient: Tensor) -> None:
        """Of a window, with respect to the embedding."""
        row_gradients = gradient[self.rows.to(gradient.device)].float()
        self.squares += torch.einsum("ri,sri->sr", row_gradients, self.changes).square_().sum(1)

    def losses(self, tokens: int) -> dict[str, float]:
        """In nats per token."""
        return dict(zip(self.schemes, (self.squares / (2 * tokens)).tolist(), strict=True))
