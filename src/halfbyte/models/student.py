"""A model that is to predict what another does: how far it is from that, and the gradients of it.

The other one, the checkpoint itself, runs once, and of each of its predictions the likeliest tokens are kept. Then the
model's tensors come from a source that may change, and a step on a batch is a pass there and one back, block by block:
memory is one block with its gradient, and what all blocks read of one batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from halfbyte.models import filling
from halfbyte.models.ahead import ReadAhead
from halfbyte.models.backward import COPIES, LOGITS_BYTES
from halfbyte.models.batches import Tokens
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.filling import TensorSource
from halfbyte.models.placement import Placement
from halfbyte.models.streams import Hidden
from halfbyte.models.walk import Walk
from halfbyte.progress import Progress, silent

KEPT = 256
"""Likeliest tokens of each prediction that are told apart; all others count as one."""
Gradients = Callable[[Block | None, dict[str, Tensor]], None]
"""Takes those of a block, or of what is around the blocks, by the parameter that they are of."""


class Prediction(NamedTuple):
    """Of a batch, position by position."""

    tokens: Int32[Tensor, "positions kept"]
    log_probabilities: Float32[Tensor, "positions kept"]
    rest: Float32[Tensor, " positions"]
    """Logarithm of the probability of all other tokens."""

    @classmethod
    def of(cls, logits: Float[Tensor, "positions vocabulary"]) -> "Prediction":
        """The likeliest of each."""
        log_probabilities = logits.float().log_softmax(-1)
        kept, tokens = log_probabilities.topk(min(KEPT, logits.shape[-1]))
        return cls(tokens.int(), kept, _rest(log_probabilities, tokens))

    def divergence(self, logits: Float[Tensor, "positions vocabulary"]) -> Float32[Tensor, " positions"]:
        """KL divergence of what is predicted from this, in nats."""
        log_probabilities, tokens = logits.float().log_softmax(-1), self.tokens.long()
        p, rest = self.log_probabilities, _rest(log_probabilities, tokens)
        lost = (p.exp() * (p - log_probabilities.gather(-1, tokens))).sum(-1)
        return lost + torch.where(self.rest.isinf(), 0.0, self.rest.exp() * (self.rest - rest))

    def __getitem__(self, positions: slice) -> "Prediction":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Prediction(*(values[positions] for values in tuple(self)))


def _rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Logarithm of the probability of all but some tokens."""
    if tokens.shape[-1] == log_probabilities.shape[-1]:
        return torch.full_like(log_probabilities[..., 0], -torch.inf)
    return log_probabilities.scatter(-1, tokens, -torch.inf).logsumexp(-1)


class Student:
    """The model of a checkpoint with the tensors of another source."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tokens,
        together: int,
        source: TensorSource,
        placement: Placement,
        progress: Progress = silent,
    ):
        """Runs the checkpoint, `together` windows at a time. Raises Unsupported for models whose blocks hand on more
        than hidden states, and for those without a head."""
        placement = replace(placement, batch_tokens=together * windows.shape[1], reads_ahead=False)
        self.walk = walk = Walk(checkpoint, windows, torch.float32, placement, gradients=True, progress=progress)
        self.batches = list(walk.batches.calibrating)
        """Their numbers."""
        for _ in walk:
            pass
        walk.ends.finish()
        with walk.ends.head() as predict:
            vocabulary = predict(self.batches[0], slice(0, 1)).shape[-1]
            self._positions = max(1, int(LOGITS_BYTES / (COPIES * 4 * vocabulary)) // together)
            self.targets = {
                batch: [Prediction.of(predict(batch, part).flatten(0, 1)) for part in self._parts(batch)]
                for batch in self.batches
            }
        walk.inputs = walk.ends.hidden = walk.inputs.empty()
        walk.source = ReadAhead(source, placement)

    def _parts(self, batch: int) -> Iterator[slice]:
        """Positions whose logits are in memory at a time."""
        length = self.walk.batches[batch].shape[1]
        return (slice(start, start + self._positions) for start in range(0, length, self._positions))

    @torch.no_grad()
    def divergence(self, batch: int) -> float:
        """Mean KL divergence from the checkpoint's predictions, in nats per token."""
        hidden = self._embedded(batch)
        for block in self.walk.blocks:
            hidden = self._run(block, hidden, batch)
        with self.walk.ends.loaded(self.walk.ends.base):
            read = self._finished(hidden, batch)
        with self.walk.ends.head():
            lost = [self._lost(batch, number, read[:, part]) for number, part in enumerate(self._parts(batch))]
        return torch.cat(lost).double().mean().item()

    def step(self, batch: int, report: Gradients) -> None:
        """The gradient of that with respect to all parameters, reported from the head to the embedding."""
        hidden, read = self._embedded(batch), []
        for block in self.walk.blocks:
            read.append(hidden)
            hidden = self._run(block, hidden, batch)
        gradient = self._back_through_head(batch, hidden, report)
        for block in reversed(self.walk.blocks):
            block.load(self.walk.source)
            parameters = self._differentiable(block.parameters)
            hidden = read.pop().requires_grad_()
            with torch.enable_grad():
                out, _ = block.returned(hidden, batch)
            gradient, gradients = _back(out, hidden, parameters, gradient)
            report(block, gradients)
            block.free()

    @torch.no_grad()
    def _embedded(self, batch: int) -> Hidden:
        """What the first block reads."""
        embedded: list[Hidden] = []

        def note(hidden: Hidden) -> Hidden:
            embedded.append(hidden)
            return hidden

        with self.walk.ends.loaded(self.walk.ends.base):
            self.walk.ends.around_blocks(self.walk.ends.base, self.walk.batches[batch], note)
        return embedded[0]

    @torch.no_grad()
    def _run(self, block: Block, hidden: Hidden, batch: int) -> Hidden:
        block.load(self.walk.source)
        hidden = block.run(hidden, batch)
        block.free()
        return hidden

    def _finished(self, hidden: Hidden, batch: int) -> Hidden:
        """What the head reads, while what is around the blocks is in memory."""
        ends = self.walk.ends
        return ends.around_blocks(ends.base, self.walk.batches[batch], lambda _: hidden).last_hidden_state

    def _lost(self, batch: int, number: int, read: Hidden) -> Float32[Tensor, " positions"]:
        """Divergence of what the head, which is in memory, predicts at the positions of a part."""
        part = list(self._parts(batch))[number]
        logits = self.walk.ends.predict(read, self.walk.batches[batch][:, part])
        return self.targets[batch][number].divergence(logits.flatten(0, 1))

    def _back_through_head(self, batch: int, hidden: Hidden, report: Gradients) -> Tensor:
        """The gradient with respect to what the last block returns."""
        ends, hidden, tokens = self.walk.ends, hidden.requires_grad_(), self.walk.batches[batch].numel()
        with ends.loaded(ends.base):
            parameters = self._differentiable([n for n in ends.outside_of(ends.base) if self._is_vector(n)])
            with torch.enable_grad():
                out = self._finished(hidden, batch)
        gradients = []
        with ends.head():
            for number, part in enumerate(self._parts(batch)):
                read = out.detach()[:, part].requires_grad_()
                with torch.enable_grad():
                    lost = self._lost(batch, number, read).sum() / tokens
                gradients += torch.autograd.grad(lost, read)
        gradient, of_parameters = _back(out, hidden, parameters, torch.cat(gradients, 1))
        report(None, of_parameters)
        return gradient

    def _is_vector(self, name: str) -> bool:
        return filling.tensor(self.walk.model, name).dim() == 1

    def _differentiable(self, names: list[str]) -> dict[str, Tensor]:
        """Those of the parameters that gradients can be had of, in memory, each once."""
        state = dict(self.walk.model.named_parameters())
        homes = dict.fromkeys(self.walk.ties.get(name, name) for name in names)
        return {
            home: state[home].requires_grad_() for home in homes if home in state and state[home].is_floating_point()
        }


def _back(
    out: Tensor, hidden: Hidden, parameters: dict[str, Tensor], gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients with respect to hidden states, and to those parameters that are computed with."""
    at_input, *found = torch.autograd.grad(
        out, [hidden, *parameters.values()], gradient.to(out.device), allow_unused=True
    )
    at_input = torch.zeros_like(hidden) if at_input is None else at_input
    return at_input, {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
