"""Walk a model block by block: `for block in walk` loads one, lets it be looked at and changed, runs it, and frees it.

One walk serves calibration and evaluation alike. Masks, positions and whatever else a family passes to its blocks come
from the model's own code (standins.py). Memory is one block, a second one that is read meanwhile where a device
computes beside the CPU, and the hidden states between two blocks (streams.py).
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from halfbyte.devices import release
from halfbyte.errors import BadCheckpoint, OutOfMemory, Unsupported
from halfbyte.grids.activations import ActivationQuant
from halfbyte.models import kv, roles, skeleton
from halfbyte.models.ahead import ReadAhead
from halfbyte.models.block import PROBE, Block
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.models.matmuls import rounding
from halfbyte.models.placement import Placement
from halfbyte.models.standins import Calls, StandIns
from halfbyte.models.streams import Hidden, Stream
from halfbyte.progress import Progress, silent

PROBE_TOKENS = 64
MASKED = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
"""Classes that fill gaps in a text. By their names: Transformers would import the code of all these families to compare
classes."""
Result = TypeVar("Result")
Tokens = Int64[Tensor, "samples length"]


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
        as_served: bool = False,
        to_the_end: bool = True,
        trials: bool = False,
        progress: Progress = silent,
    ):
        """`held_out`: samples that run along, in batches of their own. `full_precision`: the model runs unquantized
        too, beside itself as it is changed. `as_served`: activations and the KV cache are rounded as the checkpoint
        says that engines do; a checkpoint that is only the source of another is as precise as its weights.
        `to_the_end`: what the last block returns is wanted. `trials`: the first batch is a single sample, for searches
        that run a block on it again and again."""
        self.checkpoint, self.placement = checkpoint, placement or Placement()
        self.as_served, self.to_the_end, self.progress = as_served, to_the_end, progress
        self.source = ReadAhead(checkpoint, self.placement)
        self.model = skeleton.build(checkpoint, dtype)
        skeleton.move_buffers(self.model, self.device)
        self._require_decoder()
        self.shapes = checkpoint.tensors()
        self.weight_map = skeleton.places(self.model, self.shapes)
        self.ties = skeleton.ties(self.model, self.weight_map)
        if as_served and checkpoint.kv:
            kv.apply(self.model, self.weight_map, checkpoint.kv, self.device)
        self.weights = list(checkpoint.weights())
        per_batch = max(1, self.placement.batch_tokens // samples.shape[1])
        first = 1 if trials else per_batch
        rest = samples[first:].split(per_batch) if len(samples) > first else ()
        self.batches = [samples[:1, :PROBE_TOKENS], samples[:first], *rest]
        """The first is a probe, small enough to be run again and again."""
        self.calibrating = range(PROBE + 1, len(self.batches))
        self.batches += held_out.split(per_batch) if held_out is not None else []
        self.checking = range(self.calibrating.stop, len(self.batches))
        """The numbers of the batches of `samples`, and of those that are held out."""
        self._parts = [[slice(None)] for _ in self.batches]
        """Samples of each batch that run at once."""
        self._divide()
        tokens = sum(batch.numel() for batch in self.batches) * (3 if full_precision else 1)
        self.inputs = Stream(self.placement, tokens)
        """What the next block reads, by batch."""
        self.full_inputs: Stream | None = self.inputs.empty() if full_precision else None
        """What it would read if nothing had been quantized, and what it returns then: whoever changes a block fills
        that in before."""
        self.full_outputs: Stream | None = None
        self._before_head: dict[nn.Module, Any] = {}
        """What the parts returned that a head may read, for one of the batches."""
        self.returned_beside: Sequence[Any] | None = None
        """What a block returns beside hidden states, poisoned; None where it returns them alone."""
        self._has_learned = False
        self.calls = Calls()

    def _divide(self) -> None:
        """Into blocks, and what comes before and after them."""
        stack, modules = self._stack()
        inside: dict[str, list[str]] = {f"{stack}.{i}": [] for i in range(len(modules))}
        self.outside: list[str] = []
        """Parameters and buffers of what a text runs through before and after the blocks."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in skeleton.inside(self.model, ""):
            block = ".".join(name.split(".")[: stack.count(".") + 2])
            if block in inside:
                inside[block].append(name)
            elif not roles.FOREIGN.search(name):
                self.outside.append(name)
            elif name in parameters:
                skeleton.blind(self.model, [name])
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

    def _require_decoder(self) -> None:
        config = self.model.config
        if config.is_encoder_decoder or type(self.model).__name__ in MASKED:
            raise Unsupported(
                f"calibration and eval run decoders on text, and {type(self.model).__name__} is none; "
                f"{skeleton.NO_MODEL}"
            )

    def _stack(self) -> tuple[str, nn.ModuleList]:
        """The decoder's layers, with their name."""
        config = self.model.config.get_text_config(decoder=True)
        counts = {
            getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")
        }  # LongCat's layers are two in one
        decoder = self.model.get_decoder()
        prefix = next((name for name, module in self.model.named_modules() if module is decoder), "")
        lists = {
            n: m
            for n, m in self.model.named_modules()
            if isinstance(m, nn.ModuleList) and len(m) in counts and not roles.FOREIGN.search(f"{n}.")
        }
        name = next((n for n in lists if n.rpartition(".")[0] == prefix), next(iter(lists), None))
        if name is None:
            raise Unsupported(
                f"'{self.checkpoint.model_type}' ({type(self.model).__name__}) has no list of decoder layers to "
                f"walk; {skeleton.NO_MODEL}"
            )
        return name, lists[name]

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
                release(self.device)
        finally:
            self.source.close()

    @torch.no_grad()
    def start(self) -> None:
        """Run all that comes before the first block."""
        self.progress("embedding", 0, len(self.blocks))
        needed = [*self.outside, *(name for block in self.blocks for name in block.parameters)]
        skeleton.require_whole(self.model, self.checkpoint, self.weight_map, needed)
        self.blocks[0].load(self.source)
        for hidden in self._note_calls():
            self.inputs.append(hidden)
        self.blocks[0].free()
        if self.full_inputs is not None:
            if self.calls.carries:
                raise Unsupported(
                    f"gptaq runs two models side by side, and '{self.checkpoint.model_type}' hands on more than "
                    "hidden states; "
                    "--method gptq does it"
                )
            self.full_inputs = self.inputs.fork()

    def _note_calls(self) -> list[Hidden]:
        """Note what blocks are called with, for every part of every batch. Returns what the first block reads."""
        base, first, calls, found = self.base, self.blocks[0], Calls(), []
        self._load(self._outside(base))
        for batch, tokens in enumerate(self.batches):
            hidden = []
            for samples in self._parts[batch]:
                learn = None if self._has_learned else first.module.forward
                with (
                    self._standing_in(StandIns(self, calls, batch, samples, learn)) as stand_ins,
                    skeleton.refusing(self.checkpoint, "run"),
                ):
                    base(input_ids=tokens[samples].to(self.device), use_cache=False)
                hidden.append(stand_ins.close())
                self._has_learned = True
            found.append(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        skeleton.release(self.model, self.outside)
        self.calls = calls
        return found

    @contextmanager
    def _standing_in(self, stand_in: "Callable[[int], Callable] | StandIns") -> Iterator[Any]:
        """While this lasts, something else runs in place of each block."""
        own = [block.module.__dict__.get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.module.forward = stand_in(number)
        try:
            yield stand_in
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
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
        halves = [
            [half for part in parts for half in _halved(part, len(tokens))]
            for parts, tokens in zip(self._parts, self.batches, strict=True)
        ]
        if halves == self._parts:
            return False
        carried = self.calls.carried
        for batch, others in carried.items():
            carried[batch] = _divided(others, self._parts[batch], halves[batch], len(self.batches[batch]))
        self._parts = halves
        with torch.no_grad():
            self._note_calls()
        self.calls.carried = carried
        return True

    # After the last block --------------------------------------------------------------------------------------------

    def require_finite(self, hidden: Tensor, who: str) -> None:
        """Raise BadCheckpoint for hidden states that are no numbers."""
        if not torch.isfinite(hidden.sum()) and not torch.isfinite(hidden).all():
            dtype = str(hidden.dtype).removeprefix("torch.")
            raise BadCheckpoint(
                f"{self.checkpoint.path}: {who} NaN or Inf in {dtype}; the model is broken, or needs another dtype "
                f"({skeleton.NO_MODEL})"
            )

    @property
    def predicts(self) -> bool:
        """Whether the model has a head that predicts tokens; reward and embedding models have none."""
        return self.model.can_generate()

    def logits(self) -> Iterator[tuple[Int64[Tensor, "batch length"], Tensor]]:
        """After the last block: tokens and what the whole model returns for every batch but the probe, which is logits
        where it has a head."""
        if self._ends_in_head:
            self.finish()
            with self.head() as predict:
                for number, tokens in list(enumerate(self.batches))[1:]:
                    yield tokens, predict(number, slice(None))
        else:
            for tokens, out in self._finish(self.model):
                yield tokens, out.logits if hasattr(out, "logits") else out.last_hidden_state

    def states(self) -> Iterator[tuple[Int64[Tensor, "batch length"], Float[Tensor, "batch length width"]]]:
        """After the last block: tokens and last hidden states of every batch but the probe."""
        for tokens, out in self._finish(self.base):
            yield tokens, out.last_hidden_state

    @property
    def _ends_in_head(self) -> bool:
        return self.predicts and self.base is not self.model

    @property
    def _decoder(self) -> nn.Module:
        return self.model.get_submodule(self._stack()[0].rpartition(".")[0])

    @property
    def base(self) -> nn.Module:
        """All but the head: what the family calls its base, or where that is the whole model (Llama 4), its decoder."""
        base = self.model.base_model
        return self._decoder if base is self.model and self.predicts else base

    @property
    def _with_head(self) -> nn.Module:
        """What predicts from what the base returns, and does nothing else."""
        if self.model.base_model is not self.model:
            return self.model
        return self.model.get_submodule(self._stack()[0].rpartition(".")[0].rpartition(".")[0])

    @torch.no_grad()
    def finish(self) -> None:
        """After the last block: what the head reads takes the place of hidden states. Raises Unsupported for a model
        without a head."""
        if not self._ends_in_head:
            raise Unsupported(
                f"'{self.checkpoint.model_type}' ({type(self.model).__name__}) predicts no tokens, and predictions "
                "are what is compared"
            )
        base, decoder = self.base, self._decoder
        hook = decoder.register_forward_hook(
            lambda module, args, out: self._before_head.update(
                {module: out} if hasattr(out, "last_hidden_state") else {}
            )
        )
        for number, (_, out) in enumerate(self._finish(base), 1):
            self.inputs[number] = out.last_hidden_state
            self._before_head[base] = out
        hook.remove()

    @contextmanager
    def head(
        self, like: "Walk | None" = None
    ) -> Iterator[Callable[[int, slice], Float[Tensor, "batch positions vocabulary"]]]:
        """While this lasts: the logits of a batch at some positions, after `finish`. `like`: a walk whose head is in
        memory and is the same."""
        if like is None:
            self._load(self._of_head)
        else:
            for name in self._of_head:
                skeleton.put(self.model, name, like.model.get_parameter(name))

        @torch.no_grad()
        def logits(batch: int, positions: slice) -> Tensor:
            return self.predict(self.inputs[batch][:, positions], self.batches[batch][:, positions])

        try:
            yield logits
        finally:
            for module in self._before_head:
                module.__dict__.pop("forward", None)
            skeleton.release(self.model, self.outside)

    def predict(self, hidden: Hidden, tokens: Tokens) -> Float[Tensor, "batch positions vocabulary"]:
        """Logits of what the head reads, while that is in memory (`head`); differentiable with respect to `hidden`."""
        for module, whole in self._before_head.items():  # most heads ask the base for it, or (OPT's) the decoder in it
            out = copy(whole)
            out.last_hidden_state = hidden.to(self.device)
            module.forward = lambda *args, out=out, **kwargs: out
        with rounding(self._head_views(), self._read_by_head):
            return self._with_head(input_ids=tokens.to(self.device), use_cache=False).logits

    @cached_property
    def _read_by_head(self) -> dict[Weight, ActivationQuant]:
        """How what the head reads is rounded, where it is."""
        heads = [w for w in self.weights if w.block is None and w.tensor in self.weight_map] if self.as_served else []
        found = {w: inputs for w in heads if (inputs := self.checkpoint.read_inputs(w.name))}
        return {w: q._replace(params={n: p.to(self.device) for n, p in q.params.items()}) for w, q in found.items()}

    def _head_views(self) -> dict[Weight, Tensor]:
        views = {w: self.weight_map[w.tensor] for w in self._read_by_head}
        return {w: v.view(skeleton.tensor(self.model, v.parameter), self.shapes[w.tensor]) for w, v in views.items()}

    def ending_in(self, hidden: Stream) -> "Walk":
        """This pass as if other hidden states had come out of the last block: for its `finish` and `head`."""
        other = copy(self)
        other.inputs, other._before_head = hidden, dict(self._before_head)
        return other

    def same_head(self, other: "Walk") -> bool:
        """Whether this model's head is, bit for bit, that of another, whose tensors bear the same names."""
        if self.model.dtype != other.model.dtype:
            return False
        if self.checkpoint is other.checkpoint:
            return True
        homes = {self.ties.get(name, name) for name in self._of_head}
        tensors = [tensor for tensor, view in self.weight_map.items() if view.parameter in homes]
        return (
            self._of_head == other._of_head
            and bool(tensors)
            and all(self.checkpoint.same(tensor, other.checkpoint) for tensor in tensors)
        )

    @property
    def _of_head(self) -> list[str]:
        """Parameters of what comes after the base."""
        base = set(self._outside(self.base))
        return [name for name in self.outside if name not in base]

    @torch.no_grad()
    def _finish(self, part: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        with self.ends(part):
            for hidden, tokens in list(zip(self.inputs, self.batches, strict=True))[1:]:
                yield tokens, self.around_blocks(part, tokens, lambda _, hidden=hidden: hidden)

    @contextmanager
    def ends(self, part: nn.Module) -> Iterator[None]:
        """While this lasts, what runs before and after the blocks of a part of the model is in memory."""
        self._load(self._outside(part))
        yield
        skeleton.release(self.model, self.outside)

    def around_blocks(self, part: nn.Module, tokens: Tokens, instead: Callable[[Hidden], Hidden]) -> Any:
        """What a part of the model returns where `instead` of all its blocks something else makes hidden states of
        those that the first one reads; differentiable."""

        def stand_in(number: int) -> Callable:
            return lambda hidden, *args, **kwargs: self.as_returned(
                hidden if number else instead(hidden).to(self.device)
            )

        with self._standing_in(stand_in), skeleton.refusing(self.checkpoint, "run"):
            return part(input_ids=tokens.to(self.device), use_cache=False)

    def _outside(self, part: nn.Module) -> list[str]:
        prefix = next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is part)
        return [name for name in self.outside if name.startswith(prefix)]

    def _load(self, names: list[str]) -> None:
        for last in (False, True):
            try:
                skeleton.load(self.model, self.source, self.weight_map, self.ties, names, self.device)
                return
            except torch.OutOfMemoryError as error:
                if last:
                    raise OutOfMemory(
                        f"{self.device} has too little memory for the tensors around the blocks; --device cpu"
                    ) from error
            gc.collect()  # what an earlier walk has left
            release(self.device)


def _halved(part: slice, samples: int) -> list[slice]:
    first, last, _ = part.indices(samples)
    middle = (first + last + 1) // 2
    return [part] if last - first < 2 else [slice(first, middle), slice(middle, last)]


def _divided(others: list[Sequence[Any]], parts: list[slice], halves: list[slice], samples: int) -> list[Sequence[Any]]:
    """What blocks returned of parts of a batch, as of their halves: tensors of as many samples are divided, others are
    of all of them."""
    found = []
    for half in halves:
        first, last, _ = half.indices(samples)
        at, (start, stop, _) = next(
            (i, p.indices(samples))
            for i, p in enumerate(parts)
            if p.indices(samples)[0] <= first < p.indices(samples)[1]
        )
        found.append(
            [
                x[first - start : last - start] if isinstance(x, Tensor) and x.dim() and len(x) == stop - start else x
                for x in others[at]
            ]
        )
    return found
