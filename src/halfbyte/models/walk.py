"""Walk a model block by block: `for block in walk` loads one, lets it be looked at and changed, runs it, and frees it.

One walk serves calibration and evaluation alike. Masks, positions and whatever else a family passes to its blocks come
from the model's own code (standins.py). Memory is one block, a second one that is read meanwhile where a device
computes beside the CPU, and the hidden states between two blocks (streams.py).
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.devices import HELD_BYTES, release
from halfbyte.errors import BadCheckpoint, OutOfMemory, Unsupported
from halfbyte.models import filling, kv, mapping, roles, skeleton
from halfbyte.models.ahead import ReadAhead
from halfbyte.models.batches import Batches, Tokens
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.ends import Ends
from halfbyte.models.layers import decoder_layers, require_decoder
from halfbyte.models.placement import Placement
from halfbyte.models.standins import Calls, StandIns
from halfbyte.models.streams import Hidden, Stream
from halfbyte.progress import Progress, silent

Result = TypeVar("Result")


class Walk:
    """A pass of many samples of tokens through a checkpoint, one block at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Tokens,
        dtype: torch.dtype,
        placement: Placement | None = None,
        *,
        held_out: Int64[Tensor, "held_out length"] | None = None,
        full_precision: bool = False,
        fake_quantize_activations: bool = False,
        to_the_end: bool = True,
        trials: bool = False,
        gradients: bool = False,
        progress: Progress = silent,
    ):
        """`held_out`: samples that run along, in batches of their own. `gradients`: some are to be followed back from
        block to block. `full_precision`: the model runs unquantized
        too, beside itself as it is changed. `fake_quantize_activations`: activations and the KV cache are rounded as
        the checkpoint says that engines do; a checkpoint that is only the source of another is as precise as its
        weights. `to_the_end`: what the last block returns is wanted. `trials`: the first batch is a single sample, for
        searches that run a block on it again and again."""
        self.checkpoint, self.placement = checkpoint, placement or Placement()
        self.fake_quantize_activations, self.to_the_end, self.progress = fake_quantize_activations, to_the_end, progress
        self.gradients = gradients
        self.source = ReadAhead(checkpoint, self.placement)
        self.model = skeleton.build(checkpoint, dtype)
        filling.move_buffers(self.model, self.device)
        require_decoder(self.model)
        self.shapes = checkpoint.tensors()
        self.weight_map = mapping.places(self.model, self.shapes)
        self.ties = filling.ties(self.model, self.weight_map)
        if fake_quantize_activations and checkpoint.kv:
            kv.apply(self.model, self.weight_map, checkpoint.kv, self.device)
        self.weights = list(checkpoint.weights())
        self.batches = Batches(samples, held_out, self.placement.batch_tokens, trials)
        self._divide()
        tokens = self.batches.tokens * (3 if full_precision else 1)
        self.inputs = Stream(self.placement, tokens)
        """What the next block reads, by batch."""
        self.full_inputs: Stream | None = self.inputs.empty() if full_precision else None
        """What it would read if nothing had been quantized, and what it returns then: whoever changes a block fills
        that in before."""
        self.full_outputs: Stream | None = None
        self.returned_beside: Sequence[Any] | None = None
        """What a block returns beside hidden states, poisoned; None where it returns them alone."""
        self._has_learned = False
        self.calls = Calls()
        self.ends = Ends(self, self.inputs)

    def _divide(self) -> None:
        """Into blocks, and what comes before and after them."""
        self.stack, modules = decoder_layers(self.model, self.checkpoint.model_type)
        """The name of the decoder's layers."""
        stack = self.stack
        inside: dict[str, list[str]] = {f"{stack}.{i}": [] for i in range(len(modules))}
        self.outside: list[str] = []
        """Parameters and buffers of what a text runs through before and after the blocks."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in filling.inside(self.model, ""):
            block = ".".join(name.split(".")[: stack.count(".") + 2])
            if block in inside:
                inside[block].append(name)
            elif not roles.FOREIGN.search(name):
                self.outside.append(name)
            elif name in parameters:
                filling.blind(self.model, [name])
        self.blocks = [
            Block(self, module, prefix, inside[prefix]) for module, prefix in zip(modules, inside, strict=True)
        ]
        used = Counter(home for block in self.blocks for home in block.homes)
        self.shared = {home for home, blocks in used.items() if blocks > 1}
        """Parameters that several blocks compute with."""

    @property
    def device(self) -> torch.device:
        """What runs the blocks."""
        return self.placement.device

    # The pass --------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Block]:
        """Every block in turn, loaded. Then it runs as it is by then, and is freed."""
        try:
            self.start()
            for number, block in enumerate(self.blocks):
                self.progress(block.name, number, len(self.blocks))
                block.load(self.source)
                last = number + 1 == len(self.blocks)
                self.source.expect([] if last else self.blocks[number + 1].tensors)
                yield block
                if self.to_the_end or not last:
                    self.advance(block)
                block.free()
                release(self.device, HELD_BYTES)
        finally:
            self.source.close()

    @torch.no_grad()
    def start(self) -> None:
        """Run all that comes before the first block."""
        self.progress("embedding", 0, len(self.blocks))
        needed = [*self.outside, *(name for block in self.blocks for name in block.parameters)]
        filling.require_whole(self.model, self.checkpoint, self.weight_map, needed)
        self.blocks[0].load(self.source)
        for hidden in self._note_calls():
            self.inputs.append(hidden)
        self.blocks[0].free()
        if self.gradients and self.calls.carries:
            raise Unsupported(
                f"'{self.checkpoint.model_type}' hands on more than hidden states from block to block, through which "
                "no gradients are followed"
            )
        if self.full_inputs is not None:
            if self.calls.carries:
                raise Unsupported(
                    f"this method runs two models side by side, and '{self.checkpoint.model_type}' hands on more than "
                    "hidden states; "
                    "--method gptq does it"
                )
            self.full_inputs = self.inputs.fork()

    def _note_calls(self) -> list[Hidden]:
        """Note what blocks are called with, for every part of every batch. Returns what the first block reads."""
        base, first, calls, inputs = self.ends.base, self.blocks[0], Calls(), []
        self.load(self.ends.outside_of(base))
        for batch, tokens in enumerate(self.batches):
            hidden = []
            for samples in self.batches.parts[batch]:
                learn = None if self._has_learned else first.module.forward
                with (
                    self.standing_in(StandIns(self, calls, batch, samples, learn)) as stand_ins,
                    skeleton.refusing(self.checkpoint, "run"),
                ):
                    base(input_ids=tokens[samples].to(self.device), use_cache=False)
                hidden.append(stand_ins.close())
                self._has_learned = True
            inputs.append(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        filling.release(self.model, self.outside)
        self.calls = calls
        return inputs

    @contextmanager
    def standing_in(self, stand_in: "Callable[[int], Callable] | StandIns") -> Iterator[Any]:
        """While this lasts, something else runs in place of each block."""
        forwards = [block.module.__dict__.get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.module.forward = stand_in(number)
        try:
            yield stand_in
        finally:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.module.__dict__.pop("forward", None)
                if forward is not None:
                    block.module.forward = forward

    def as_returned(self, hidden: Tensor) -> Any:
        """What a block with this output returns."""
        return hidden if self.returned_beside is None else (hidden, *self.returned_beside)

    def advance(self, block: Block) -> None:
        """Run the block as it now is: its outputs are what the next one reads."""
        for batch in range(len(self.batches)):
            self.inputs[batch], others = self.fitting(lambda batch=batch: block.returned(self.inputs[batch], batch))
            if self.calls.carries:
                self.calls.carried[batch] = others
        if self.full_inputs is not None:
            if self.full_outputs is None:
                raise RuntimeError(f"{block.name} was changed before it ran in full precision")
            self.full_inputs, self.full_outputs = self.full_outputs, None

    def run_full_precision(self, block: Block) -> None:
        """Run the block on the full-precision stream, before anything in it is changed."""
        if self.full_inputs is None or self.full_outputs is not None:
            return
        outputs = self.full_inputs.fork()
        for batch in range(len(self.batches)):
            outputs[batch] = self.fitting(lambda batch=batch: block.run(outputs[batch], batch))
        self.full_outputs = outputs

    @property
    def spilled_bytes(self) -> int:
        """Of hidden states in files."""
        return sum(stream.file_bytes for stream in (self.inputs, self.full_inputs, self.full_outputs) if stream)

    # Memory ----------------------------------------------------------------------------------------------------------

    def fitting(self, work: Callable[[], Result]) -> Result:
        """The result of some work that leaves nothing behind when it fails. Where a device has too little memory for
        it, that is done again with hidden states elsewhere, and then with half of a batch at a time."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
            gc.collect()  # what the frames of the error held
            release(self.device)
            if not self._shrink():
                raise OutOfMemory(
                    f"{self.device} has too little memory for one sample of {self.batches[-1].shape[1]} tokens "
                    f"({reason}); "
                    "give a smaller --length, or --device cpu"
                )

    def _shrink(self) -> bool:
        """Have batches take less of the device's memory; False where they cannot."""
        streams = [s for s in (self.inputs, self.full_inputs, self.full_outputs) if s is not None]
        on_device = [stream for stream in streams if stream.is_on_device]
        for stream in on_device:
            stream.leave_device()
        if on_device:
            return True
        carried = self.calls.carried
        if not self.batches.halve(carried):
            return False
        with torch.no_grad():
            self._note_calls()
        self.calls.carried = carried
        return True

    def require_finite(self, hidden: Tensor, who: str) -> None:
        """Raise BadCheckpoint for hidden states that are no numbers."""
        if not torch.isfinite(hidden.sum()) and not torch.isfinite(hidden).all():
            dtype = str(hidden.dtype).removeprefix("torch.")
            raise BadCheckpoint(
                f"{self.checkpoint.path}: {who} NaN or Inf in {dtype}; the model is broken, or needs another dtype "
                f"({filling.NO_MODEL})"
            )

    def logits(self) -> Iterator[tuple[Tokens, Tensor]]:
        """After the last block: tokens and what the whole model returns for every batch but the probe, which is logits
        where it has a head."""
        return self.ends.logits()

    def load(self, names: list[str]) -> None:
        """Give parameters and buffers their values."""
        for last in (False, True):
            try:
                filling.load(self.model, self.source, self.weight_map, self.ties, names, self.device)
                return
            except torch.OutOfMemoryError as error:
                if last:
                    raise OutOfMemory(
                        f"{self.device} has too little memory for the tensors around the blocks; --device cpu"
                    ) from error
            gc.collect()  # what an earlier walk has left
            release(self.device)
