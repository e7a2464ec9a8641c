"""What each weight costs on each grid, measured: it is rounded alone in the model as it is, and the KL divergence at
the output is taken on text that nothing was fitted to.

Trials of a block run in one pass, as those of `blame` do: until that block everything is as in the model, and from
there each trial has hidden states of its own. So a weight on a grid takes half a forward pass on average. The solver's
statistics are those of what the original reads, from the rest of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.block_solvers import solve_matrix
from halfbyte.budget.ledger import Ledger
from halfbyte.budget.sensitivity import Wanted, missing
from halfbyte.errors import Unsupported
from halfbyte.evaluation.divergence import compare, scores, windows_at_once
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.quantized import Scheme
from halfbyte.models.batches import Tokens
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.collect import collect, in_parts, reading_groups
from halfbyte.models.placement import Placement
from halfbyte.models.streams import Stream
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress, silent
from halfbyte.recipe import Method
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import Statistics

HELD_OUT = 8
"""Windows on which is measured, and at most a quarter of all."""


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
    left = missing(wanted, ledger)
    if not left:
        return
    count = max(1, min(HELD_OUT, len(windows) // 4))
    fitted, held_out = windows[: max(1, len(windows) - count)], windows[-count:]
    for weight, schemes in left.items():
        if weight.block is None:
            progress(weight.name, 0, 1)
            ledger.add({weight.name: _of_table(checkpoint, weight, schemes, held_out, placement)})
    if all(weight.block is None for weight in left):
        return
    walk = Walk(checkpoint, fitted, torch.float32, placement, to_the_end=False, progress=progress)
    for block in walk:
        if walk.calls.carries:
            raise Unsupported(
                f"'{checkpoint.model_type}' hands on more than hidden states from block to block, which single weights "
                "are not followed through; leave out --sensitivity measured"
            )
        here = {weight: left[weight] for weight in block.weights if weight in left}
        for weight, name, loss in _of_block(block, here, held_out, method) if here else ():
            ledger.add({weight.name: {name: loss}})


def _of_table(
    checkpoint: Checkpoint, weight: Weight, schemes: Mapping[str, Scheme], held_out: Tokens, placement: Placement | None
) -> dict[str, float]:
    """Of an embedding, a head, or both in one: rounded to nearest, as whatever lies outside of the blocks is."""
    w = checkpoint.read_weight(weight)
    rounded = (SOLVERS["nearest"](w, scheme.weight, None).decode().to(w.dtype) for scheme in schemes.values())
    others = [checkpoint.replaced(values={weight.tensor: value}) for value in rounded]
    rows = compare([checkpoint, *others], held_out, placement=placement)[1:]
    return {name: max(0.0, row["kl"]) for name, row in zip(schemes, rows, strict=True)}


class _Trial(NamedTuple):
    """A weight on a grid."""

    weight: Weight
    name: str
    scheme: Scheme


def _of_block(block: Block, wanted: Wanted, held_out: Tokens, method: Method) -> Iterator[tuple[Weight, str, float]]:
    walk = block.walk
    at_once = windows_at_once(walk.checkpoint, held_out.numel(), torch.float32.itemsize)
    for part in in_parts(reading_groups(block, [[weight] for weight in wanted]), walk.placement.statistics_bytes):
        statistics = collect(block, part, walk.inputs)
        trials = [_Trial(w, name, s) for w, schemes in wanted.items() if w in part for name, s in schemes.items()]
        for some in (trials[i : i + at_once] for i in range(0, len(trials), at_once)):
            losses = _tried(block, some, held_out, statistics, method)
            yield from ((trial.weight, trial.name, loss) for trial, loss in zip(some, losses, strict=True))


def _tried(
    original: Block,
    trials: Sequence[_Trial],
    held_out: Tokens,
    statistics: Mapping[Weight, Statistics],
    method: Method,
) -> list[float]:
    """In nats per token."""
    walk = Walk(original.walk.checkpoint, held_out, torch.float32, original.walk.placement)
    streams: list[Stream] = []
    for block in walk:
        for hidden in streams:
            _advance(block, hidden)
        if block.name == original.name:
            for trial in trials:
                streams.append(_alone(block, trial, original.weight(trial.weight), statistics, method))
    walk.ends.finish()
    ends = [walk.ends.given(hidden) for hidden in streams]
    for end in ends:
        end.finish()
    return [max(0.0, tokens.kl.mean().item()) for tokens in scores([walk.ends, *ends], 0)[1:]]


def _alone(block: Block, trial: _Trial, w: Tensor, statistics: Mapping[Weight, Statistics], method: Method) -> Stream:
    """What the block returns with one weight rounded."""
    weight, scheme, seen = trial.weight, trial.scheme, statistics.get(trial.weight)
    hidden = block.walk.inputs.fork()
    with block.trial(weight.tensor):
        block.weight(weight).copy_(solve_matrix(w.contiguous(), scheme.weight, seen, method)[0].decode())
        if scheme.activations and seen:
            fitted = scheme.activations.fit(seen.activation_stats, "max")
            block.round_activations(weight, ActivationQuant(scheme.activations, fitted))
        _advance(block, hidden)
    return hidden


def _advance(block: Block, hidden: Stream) -> None:
    for batch in range(len(hidden)):
        hidden[batch] = block.walk.fitting(lambda batch=batch: block.run(hidden[batch], batch))
