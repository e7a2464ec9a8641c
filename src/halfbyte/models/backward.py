"""Walk a model back, from what it predicts to what it reads: gradients of log-probabilities with respect to weights.

Labels are drawn from the model's own predictions, so a product of two of these gradients is, on average, an entry of
the Fisher information: the second derivative of the KL divergence from the model as it is. A window of text is one
sample; memory is one block with its gradient, and the hidden states between all blocks (streams.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.errors import Unsupported
from halfbyte.models import filling
from halfbyte.models.batches import Tokens
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.matmuls import GradientCapture
from halfbyte.models.memory import LOGITS_BYTES
from halfbyte.models.placement import Placement
from halfbyte.models.streams import Hidden, Stream
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress, silent

COPIES = 4
"""How many predictions of one size there are at a time."""


class Backward:
    """A pass back. `predictions`, then every block from the last to the first, then `embedding`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tokens,
        placement: Placement | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ):
        """Raises Unsupported for models whose blocks hand on more than hidden states, and for those without a head."""
        placement = replace(placement or Placement(), batch_tokens=windows.shape[1])
        self.walk = Walk(checkpoint, windows, torch.float32, placement, progress=progress)
        self.samples = self.walk.batches.calibrating
        """Numbers of the batches, of a window each."""
        self._generator = torch.Generator().manual_seed(seed)
        self._read: list[Stream] = []
        for _ in self.walk:
            if self.walk.calls.carries:
                raise Unsupported(
                    f"'{checkpoint.model_type}' hands on more than hidden states from block to block, through which no "
                    "gradients are followed; --method gptq without guided, and --sensitivity measured, need none"
                )
            self._read.append(self._kept(self.walk.inputs, len(self.walk.blocks) + 2))
        self._returned = self._kept(self.walk.inputs, len(self.walk.blocks) + 2)
        self.walk.ends.finish()
        self.gradients = self._returned.empty()
        """With respect to what the part read that was gone back through last, by batch."""

    def _kept(self, hidden: Stream, copies: int) -> Stream:
        """The same, in memory or in files, as is right for so many of them."""
        stream = Stream(self.walk.placement, hidden.tokens * copies)
        for batch in hidden:
            stream.append(batch)
        return stream

    def predictions(self) -> Iterator[tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens vocabulary"]]]:
        """Go back through the head: what it reads and the probabilities that it gives, some tokens at a time."""
        walk, gradients = self.walk, dict[int, list[Tensor]]()
        vocabulary = walk.model.config.get_text_config(decoder=True).vocab_size
        step = max(1, int(LOGITS_BYTES / (COPIES * 4 * vocabulary)))
        with walk.ends.head():
            for batch in self.samples:
                tokens = walk.batches[batch]
                for start in range(0, tokens.shape[1], step):
                    part = slice(start, start + step)
                    read = walk.inputs[batch][:, part].to(walk.device).requires_grad_()
                    with torch.enable_grad():
                        log_probabilities = walk.ends.predict(read, tokens[:, part]).float().log_softmax(-1)
                        probabilities = log_probabilities.detach().exp().flatten(0, -2)
                        drawn = torch.multinomial(probabilities.cpu(), 1, generator=self._generator).to(
                            log_probabilities.device
                        )
                        (gradient,) = torch.autograd.grad(log_probabilities.flatten(0, -2).gather(1, drawn).sum(), read)
                    gradients.setdefault(batch, []).append(gradient)
                    yield read.detach().flatten(0, -2), probabilities
        with walk.ends.loaded(walk.ends.base):
            self._set(0, torch.zeros_like(self._returned[0]))
            for batch in self.samples:
                hidden = self._returned[batch].to(walk.device).requires_grad_()
                with torch.enable_grad():
                    out = walk.ends.around_blocks(walk.ends.base, walk.batches[batch], lambda _, hidden=hidden: hidden)
                self._set(
                    batch, *torch.autograd.grad(out.last_hidden_state, hidden, torch.cat(gradients.pop(batch), 1))
                )

    def _set(self, batch: int, gradient: Tensor) -> None:
        if batch < len(self.gradients):
            self.gradients[batch] = gradient
        else:
            self.gradients.append(gradient)

    def __iter__(self) -> Iterator[Block]:
        """Every block, from the last to the first, loaded; `walk.inputs` are what it reads. Then, if `through` was not
        asked for each sample, it is gone back through without a look at its weights."""
        walk = self.walk
        for number in reversed(range(len(walk.blocks))):
            block = walk.blocks[number]
            walk.progress(block.name, len(walk.blocks) - number, len(walk.blocks))
            block.load(walk.source)
            walk.inputs, self._todo = self._read.pop(), set(self.samples)
            yield block
            for batch in sorted(self._todo):
                self.through(block, batch, ())
            block.free()

    def through(self, block: Block, batch: int, weights: Sequence[Weight]) -> list[Float[Tensor, "out in"]]:
        """Go back through a block for one sample: the gradients with respect to some of its weights."""
        self._todo.remove(batch)
        values = {weight: block.weight(weight).detach().requires_grad_() for weight in weights}
        hidden = self.walk.inputs[batch].to(self.walk.device).requires_grad_()
        with torch.enable_grad():
            out = block.run_with(values, hidden, batch)
        at_input, *gradients = torch.autograd.grad(
            out, [hidden, *values.values()], self.gradients[batch].to(out.device), allow_unused=True
        )
        self.gradients[batch] = torch.zeros_like(hidden) if at_input is None else at_input
        return [torch.zeros_like(v) if g is None else g for v, g in zip(values.values(), gradients, strict=True)]

    def observe(self, block: Block, batch: int, report: Callable[[Weight, Tensor], None]) -> None:
        """Go back through a block for one sample, and report the gradients at the outputs of its weights."""
        with GradientCapture(block.matrices(), report):
            self.through(block, batch, ())

    def embedding(self, tensor: str) -> Iterator[Float[Tensor, "vocabulary width"]]:
        """Last of all: the gradient with respect to an embedding for each sample, as what the blocks read is made of
        it."""
        walk, name = self.walk, self.walk.weight_map[tensor].parameter
        with walk.ends.loaded(walk.ends.base):
            table = nn.Parameter(filling.tensor(walk.model, name))
            filling.put(walk.model, name, table)
            for batch in self.samples:
                embedded: list[Hidden] = []

                def note(hidden: Hidden, embedded: list[Hidden] = embedded) -> Hidden:
                    embedded.append(hidden)
                    return hidden.detach()

                with torch.enable_grad():
                    walk.ends.around_blocks(walk.ends.base, walk.batches[batch], note)
                yield torch.autograd.grad(embedded[0], table, self.gradients[batch].to(table.device))[0]
