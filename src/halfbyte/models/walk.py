"""Walk a model block by block: load one, show what its linears read, let it be changed, run it, free it.

The model's own forward runs with each block replaced by a stand-in that notes what the block is called with and hands
its input on. So masks, positions and whatever else a family passes to its blocks come from its own code, and one walk
serves calibration and evaluation alike. Memory is one block and the hidden states between two blocks.

That is the model's own computation where the blocks run once each, in order, and hand one another what they return, untouched.
The stand-ins look whether it is so, and a model of another kind is refused by name.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ActivationQuant
from halfbyte.models import kv, roles, skeleton
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.solvers.statistics import Statistics

BATCH_TOKENS = 2048
BUDGET = 4e9
"""Bytes of hidden states that are kept in memory; more than these are pages of files, which the system writes out as it needs."""
PROBE, PROBE_TOKENS = 0, 64
MASKED = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
"""Classes that fill gaps in a text. By their names: Transformers would import the code of all these families to compare classes."""
DROPPED = {"past_key_values", "past_key_value", "use_cache", "cache_position"}
Report = Callable[[list["Matrix"], Tensor], Tensor | None]
"""Sees what some matrices read, and may return what they are to read instead."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a block that something is multiplied by: one to quantize, or another, such as a router."""

    tensor: str
    expert: int | None
    weight: Weight | None
    """None: not to be quantized."""


@dataclass(frozen=True)
class Carried:
    """An argument that the block before returns beside its hidden states: the one of this number."""

    number: int


class Block:
    """One decoder layer. Its parameters hold values between `load` and `free`."""

    def __init__(self, walk: "Walk", module: nn.Module, prefix: str, parameters: list[str]):
        self.walk, self.module, self.parameters = walk, module, parameters
        self.tensors = [t for t, place in walk.places.items() if place.parameter.startswith(f"{prefix}.")]
        if not self.tensors:
            raise BadCheckpoint(f"the checkpoint has no tensor of {prefix}")
        self.name = roles.block_of(self.tensors[0]) or prefix
        own = set(self.tensors)
        self.weights = [w for w in walk.weights if w.tensor in own]
        self.rows: dict[Weight, Tensor] = {}
        self.columns: dict[Weight, Tensor] = {}
        """Scales of rows and columns that folds have moved, not yet in memory: there they would be rounded to 16 bits."""
        self.inputs: dict[Weight, ActivationQuant] = {}
        """How what these read is rounded whenever the block runs."""

    @property
    def head_dims(self) -> list[int]:
        """Widths of one head of values, as the family's own modules state them; several where attention is of several kinds."""
        stated = {
            getattr(m, name)
            for m in self.module.modules()
            for name in ("v_head_dim", "head_dim", "head_size")
            if hasattr(m, name)
        }
        return sorted(stated) or [1]

    @property
    def homes(self) -> set[str]:
        """Parameters whose memory the block computes with; where blocks share some, they lie in the first of them."""
        return {self.walk.ties.get(name, name) for name in self.parameters}

    def load(self, source: Checkpoint) -> None:
        skeleton.load(self.walk.model, source, self.walk.places, self.walk.ties, self.parameters, self.walk.device)
        if self.walk.as_served:
            self.inputs = {w: inputs for w in self.weights if (inputs := source.read_inputs(w.name))}
            if self.inputs and self.walk.shared:
                raise Unsupported(
                    f"'{source.model_type}' shares weights between blocks, whose rounded inputs are not followed; round weights alone"
                )

    def free(self) -> None:
        """Take the memory back, but for what later blocks share."""
        later = self.walk.blocks[self.walk.blocks.index(self) + 1 :]
        kept = set().union(*(block.homes for block in later)) & self.walk.shared if self.walk.shared else set()
        skeleton.release(self.walk.model, {*self.parameters, *self.homes} - kept)

    def view(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint, as a view of the parameter in which it lies."""
        place = self.walk.places[tensor]
        return place.view(skeleton.tensor(self.walk.model, place.parameter), self.walk.shapes[tensor])

    def weight(self, weight: Weight) -> Float[Tensor, "out in"]:
        """A view of the parameter."""
        return self.matrix(Matrix(weight.tensor, weight.expert, weight))

    def target(self, weight: Weight) -> Float[Tensor, "out in"]:
        """What a solver is to round: the weight with the scales of all folds."""
        w = self.weight(weight)
        if weight in self.rows or weight in self.columns:
            w = w.float()
            w = w * self.rows[weight][:, None] if weight in self.rows else w
            w = w * self.columns[weight] if weight in self.columns else w
        return w.contiguous()

    def put(self, weight: Weight, value: Float[Tensor, "out in"]) -> None:
        """From now on the block computes with `value`, which has the scales of all folds in it."""
        self.weight(weight).copy_(value)
        self.rows.pop(weight, None)
        self.columns.pop(weight, None)

    def matrix(self, matrix: Matrix) -> Float[Tensor, "out in"]:
        """A view of the parameter, whether it is to be quantized or not."""
        view = self.view(matrix.tensor)
        view = view if matrix.expert is None else view[matrix.expert]
        return view.T if matrix.weight and matrix.weight.transposed else view

    def matrices(self) -> Iterator[tuple[Matrix, Tensor]]:
        """Every matrix of the block, with its view."""
        by_tensor: dict[str, list[Weight]] = {}
        for weight in self.weights:
            by_tensor.setdefault(weight.tensor, []).append(weight)
        for tensor in self.tensors:
            view = self.view(tensor)
            if view.dim() == 2:
                yield Matrix(tensor, None, by_tensor.get(tensor, [None])[0]), view
            elif view.dim() == 3:
                owned = {w.expert: w for w in by_tensor.get(tensor, [])}
                for expert in range(view.shape[0]):
                    yield Matrix(tensor, expert, owned.get(expert)), view[expert]

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: int) -> Tensor:
        return self.outputs(hidden, batch)[0]

    def outputs(self, hidden: Tensor, batch: int) -> Sequence[Any]:
        """Hidden states, and whatever else the block returns."""
        args, kwargs = self.walk.calls[self.module][batch]
        args = [self.walk.carried[batch][a.number] if isinstance(a, Carried) else a for a in args]
        kwargs = {
            name: self.walk.carried[batch][a.number] if isinstance(a, Carried) else a for name, a in kwargs.items()
        }
        with Uses(self.matrices(), self._rounded) if self.inputs else nullcontext():
            out = self.module(hidden.to(self.walk.device), *args, **kwargs)
        out = out if isinstance(out, (tuple, list)) else (out,)
        self.walk.require_finite(out[0], f"{self.name} computes")
        return out

    def _rounded(self, matrices: list[Matrix], x: Tensor) -> Tensor | None:
        """Matrices of one product are rounded alike: a scheme's inputs are known by what is read, not by who reads."""
        inputs = next((i for m in matrices if m.weight and (i := self.inputs.get(m.weight))), None)
        return inputs.round(x) if inputs else None

    def observe(self, report: Report, batches: Iterable[int], hidden: list[Tensor] | None = None) -> list[Tensor]:
        """Run the batches and report every product with a matrix of the block; returns the block's outputs."""
        with Uses(self.matrices(), report):
            return [self.run((hidden or self.walk.hidden)[batch], batch) for batch in batches]

    def groups(self) -> list[list[Matrix]]:
        """Matrices that read the same tensor, found by its identity while the probe runs."""
        groups: list[tuple[Tensor, list[Matrix]]] = []

        def note(matrices: list[Matrix], x: Tensor) -> None:
            for other, group in groups:  # `groups` keeps every input alive, so no address is used twice
                if other.data_ptr() == x.data_ptr() and other.numel() == x.numel() and other.shape[-1] == x.shape[-1]:
                    group.extend(m for m in matrices if m not in group)
                    return
            groups.append((x, list(matrices)))

        self.observe(note, [PROBE])
        return [group for _, group in groups]

    def collect(self, wanted: set[Weight]) -> dict[Weight, Statistics]:
        """One statistic for each group with a wanted weight. Weights that no token reaches, such as idle experts, get none."""
        found: dict[Weight, Statistics] = {}
        leaders: dict[Weight, Weight] = {}

        def join(matrices: list[Matrix]) -> None:
            weights = [m.weight for m in matrices if m.weight and m.weight in wanted]
            if weights:
                shared = found.get(weights[0]) or Statistics(weights[0].shape[1], self.walk.device)
                found.update(dict.fromkeys(weights, shared))
                leaders.update(dict.fromkeys(weights, weights[0]))

        def first_of(matrices: list[Matrix]) -> Weight | None:
            return next((m.weight for m in matrices if m.weight and m.weight in wanted), None)

        originals: dict[Weight, Tensor] = {}

        def note(matrices: list[Matrix], x: Tensor) -> None:
            if (weight := first_of(matrices)) and leaders.get(weight, weight) == weight:
                originals[weight] = x

        def add(matrices: list[Matrix], x: Tensor) -> None:
            if weight := first_of(matrices):
                if weight not in leaders:  # an expert that the probe did not reach
                    join(matrices)
                if leaders[weight] == weight:
                    original = originals.pop(weight, None)
                    # Where quantization sends a token to another expert, the two streams cannot be compared.
                    found[weight].add(x, original if original is not None and original.shape == x.shape else None)

        for group in self.groups():
            join(group)
        twin = self.walk.original
        for batch in range(1, len(self.walk.batches)):
            if twin is not None:
                originals.clear()
                twin[batch] = self.walk.kept(self.observe(note, [batch], twin)[0])
            self.observe(add, [batch])
        return {weight: s for weight, s in found.items() if s.tokens}


class Uses(TorchFunctionMode):
    """Reports each product of a tensor with a matrix of the block, with a part of one, or with several at once, and has it read
    what the report returns."""

    def __init__(self, matrices: Iterable[tuple[Matrix, Tensor]], report: Report):
        """Of matrices, each with its view."""
        super().__init__()
        self.report = report
        self.owners: dict[int, list[tuple[int, int, Matrix, bool]]] = {}
        self.alive: list[Tensor] = []
        """Casts of matrices, kept so that no address is used twice."""
        for matrix, view in matrices:
            start, end = extent(view)
            row_major = (view.stride(-1) == 1) != (matrix.weight is not None and matrix.weight.transposed)
            self.owners.setdefault(view.untyped_storage().data_ptr(), []).append((start, end, matrix, row_major))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.linear:
            args = (self._see(args[0], args[1], is_linear=True), *args[1:])
        elif func in (torch.addmm, torch.Tensor.addmm):
            args = (args[0], self._see(args[1], args[2], is_linear=False), *args[2:])
        elif func in PRODUCTS:
            args = (self._see(args[0], args[1], is_linear=False), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in CASTS:
            self._follow(args[0], result)
        return result

    def _follow(self, tensor: Tensor, cast: Tensor) -> None:
        """A copy in another dtype stands for the same matrices: many routers multiply by theirs in 32 bits."""
        owners = self.owners.get(tensor.untyped_storage().data_ptr())
        if (
            owners
            and cast.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            and cast.stride() == tensor.stride()
        ):
            shift = int(cast.storage_offset()) - int(tensor.storage_offset())
            moved = [(first + shift, last + shift, m, row_major) for first, last, m, row_major in owners]
            self.owners[cast.untyped_storage().data_ptr()] = moved
            self.alive.append(cast)

    def _see(self, x: Tensor, operand: Tensor, is_linear: bool) -> Tensor:
        """What the product is to read."""
        owners = self.owners.get(operand.untyped_storage().data_ptr())
        if owners is None:
            return x
        if operand.dim() == 3:  # a product over all experts at once
            read = [self._see(x[number], operand[number], is_linear) for number in range(operand.shape[0])]
            return (
                x
                if all(part.data_ptr() == x[number].data_ptr() for number, part in enumerate(read))
                else torch.stack(read)
            )
        start, end = extent(operand)
        read = [(m, row_major) for first, last, m, row_major in owners if first < end and start < last]
        for matrix, row_major in read:
            if matrix.weight and row_major != (is_linear == (operand.stride(-1) == 1)):
                raise BadCheckpoint(
                    f"'{matrix.tensor}' lies transposed to what halfbyte thinks; its family needs a row in models/roles.py (TRANSPOSED)"
                )
        instead = self.report([m for m, _ in read], x) if read else None
        return x if instead is None else instead


def extent(view: Tensor) -> tuple[int, int]:
    """First and last element of its storage that a view may touch, the last exclusive."""
    start = int(view.storage_offset())
    return start, start + 1 + sum((int(n) - 1) * int(s) for n, s in zip(view.shape, view.stride(), strict=True))


PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
CASTS = {torch.Tensor.float, torch.Tensor.to, torch.Tensor.type}


class Walk:
    """A pass of many windows of tokens through a checkpoint, one block at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Int64[Tensor, "windows length"],
        dtype: torch.dtype,
        device: str = "cpu",
        twin: bool = False,
        scratch: Path | None = None,
        as_served: bool = False,
    ):
        """`scratch` is a folder on a disk, for hidden states beyond the budget. `as_served`: inputs and the KV cache are rounded as the
        checkpoint says that engines do; a checkpoint that is only the source of another is as precise as its weights."""
        self.checkpoint, self.device, self.scratch, self.as_served = (
            checkpoint,
            torch.device(device),
            scratch,
            as_served,
        )
        self._tokens = windows.numel() * (2 if twin else 1)
        self.model = skeleton.build(checkpoint, dtype)
        self._require_decoder()
        self.shapes = checkpoint.tensors()
        self.places = skeleton.places(self.model, self.shapes)
        self.ties = skeleton.ties(self.model, self.places)
        if as_served and checkpoint.kv:
            kv.apply(self.model, self.places, checkpoint.kv)
        self.weights = list(checkpoint.weights())
        per_batch = max(1, BATCH_TOKENS // windows.shape[1])
        self.batches = [windows[:1, :PROBE_TOKENS], *windows.split(per_batch)]
        """The first is a probe, small enough to be run again and again."""
        stack, modules = self._stack()
        inside: dict[str, list[str]] = {f"{stack}.{i}": [] for i in range(len(modules))}
        self.outside = []
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
        self.calls: dict[nn.Module, list[tuple[tuple, dict[str, Any]]]] = {module: [] for module in modules}
        self.hidden: list[Tensor] = []
        """What the next block reads, by batch."""
        self.original: list[Tensor] | None = [] if twin else None
        """What it would read if nothing had been quantized. `Block.collect` moves it on."""
        self.carried: dict[int, Sequence[Any]] = {}
        """What the last block returned, by batch, where the next one reads more of it than hidden states."""
        self._before_head: dict[nn.Module, Any] = {}
        """What the parts returned that a head may read, for one of the batches."""
        self._returned: Sequence[Any] | None = None
        """What a block returns beside hidden states, poisoned; None where it returns them alone."""

    def _require_decoder(self) -> None:
        config = self.model.config
        if config.is_encoder_decoder or type(self.model).__name__ in MASKED:
            raise Unsupported(
                f"calibration and eval run decoders on text, and {type(self.model).__name__} is none; {skeleton.NO_MODEL}"
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
                f"'{self.checkpoint.model_type}' ({type(self.model).__name__}) has no list of decoder layers to walk; {skeleton.NO_MODEL}"
            )
        return name, lists[name]

    @torch.no_grad()
    def start(self) -> None:
        """Run all that comes before the first block."""
        base = self.model.base_model
        needed = [*self.outside, *(name for block in self.blocks for name in block.parameters)]
        skeleton.require_whole(self.model, self.checkpoint, self.places, needed)
        self._load(self._outside(base))
        first = self.blocks[0]
        first.load(self.checkpoint)
        for number, tokens in enumerate(self.batches):
            with (
                self._standing_in(Notes(self, first.module.forward if number == 0 else None)) as notes,
                skeleton.refusing(self.checkpoint, "run"),
            ):
                base(input_ids=tokens.to(self.device), use_cache=False)
            notes.close()
        first.free()
        skeleton.release(self.model, self.outside)
        if self.original is not None:
            if self.carries:
                raise Unsupported(
                    f"gptaq runs two models side by side, and '{self.checkpoint.model_type}' hands on more than hidden states; --method gptq does it"
                )
            self.original = list(self.hidden)

    @contextmanager
    def _standing_in(self, stand_in: "Callable[[int], Callable] | Notes") -> Iterator[Any]:
        """While this lasts, something else runs in place of each block."""
        for number, block in enumerate(self.blocks):
            block.module.forward = stand_in(number)
        try:
            yield stand_in
        finally:
            for block in self.blocks:
                block.module.__dict__.pop("forward", None)

    def returned(self, hidden: Tensor) -> Any:
        """What a block with this output returns."""
        return hidden if self._returned is None else (hidden, *self._returned)

    @property
    def carries(self) -> bool:
        return any(
            isinstance(a, Carried)
            for calls in self.calls.values()
            for args, kwargs in calls[:1]
            for a in (*args, *kwargs.values())
        )

    def advance(self, block: Block) -> None:
        """Run the block as it now is: its outputs are what the next one reads."""
        carries = self.carries
        for batch in range(len(self.batches)):
            hidden, *others = block.outputs(self.hidden[batch], batch)
            self.hidden[batch] = self.kept(hidden)
            if carries:
                self.carried[batch] = others

    def kept(self, hidden: Tensor) -> Tensor:
        """The same values, in memory or in a file that is gone when the last tensor in it is."""
        if self.scratch is None or self._tokens * hidden.shape[-1] * hidden.dtype.itemsize <= BUDGET:
            return hidden
        with TemporaryFile(dir=self.scratch) as file:
            file.write(hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            values = torch.frombuffer(mmap(file.fileno(), 0), dtype=hidden.dtype)
        return values.view(hidden.shape)

    def require_finite(self, hidden: Tensor, who: str) -> None:
        """Raise BadCheckpoint for hidden states that are no numbers."""
        if not torch.isfinite(hidden.sum()) and not torch.isfinite(hidden).all():
            dtype = str(hidden.dtype).removeprefix("torch.")
            raise BadCheckpoint(
                f"{self.checkpoint.path}: {who} NaN or Inf in {dtype}; the model is broken, or needs another dtype ({skeleton.NO_MODEL})"
            )

    @property
    def predicts(self) -> bool:
        """Whether the model has a head that predicts tokens; reward and embedding models have none."""
        return self.model.can_generate()

    def logits(self) -> Iterator[tuple[Int64[Tensor, "batch length"], Tensor]]:
        """After the last block: tokens and what the whole model returns for every batch but the probe, which is logits where it has a head."""
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
        for tokens, out in self._finish(self.model.base_model):
            yield tokens, out.last_hidden_state

    @property
    def _ends_in_head(self) -> bool:
        return self.predicts and self.model.base_model is not self.model

    @torch.no_grad()
    def finish(self) -> None:
        """After the last block: what the head reads takes the place of hidden states. Raises Unsupported for a model without a head."""
        if not self._ends_in_head:
            raise Unsupported(
                f"'{self.checkpoint.model_type}' ({type(self.model).__name__}) predicts no tokens, and predictions are what is compared"
            )
        base, decoder = self.model.base_model, self.model.get_submodule(self._stack()[0].rpartition(".")[0])
        hook = decoder.register_forward_hook(
            lambda module, args, out: self._before_head.update(
                {module: out} if hasattr(out, "last_hidden_state") else {}
            )
        )
        for number, (_, out) in enumerate(self._finish(base), 1):
            self.hidden[number] = out.last_hidden_state
            self._before_head[base] = out
        hook.remove()

    @contextmanager
    def head(
        self, like: "Walk | None" = None
    ) -> Iterator[Callable[[int, slice], Float[Tensor, "batch positions vocabulary"]]]:
        """While this lasts: the logits of a batch at some positions, after `finish`. `like`: a walk whose head is in memory and is the same."""
        if like is None:
            self._load(self._of_head)
        else:
            for name in self._of_head:
                skeleton.put(self.model, name, like.model.get_parameter(name))

        @torch.no_grad()
        def logits(batch: int, positions: slice) -> Tensor:
            for (
                module,
                whole,
            ) in self._before_head.items():  # most heads ask the base for hidden states, or (OPT's) the decoder in it
                out = copy(whole)
                out.last_hidden_state = self.hidden[batch][:, positions]
                module.forward = lambda *args, out=out, **kwargs: out
            return self.model(input_ids=self.batches[batch][:, positions].to(self.device), use_cache=False).logits

        try:
            yield logits
        finally:
            for module in self._before_head:
                module.__dict__.pop("forward", None)
            skeleton.release(self.model, self.outside)

    def same_head(self, other: "Walk") -> bool:
        """Whether this model's head is, bit for bit, that of another, whose tensors bear the same names."""
        homes = {self.ties.get(name, name) for name in self._of_head}
        tensors = [tensor for tensor, place in self.places.items() if place.parameter in homes]
        return (
            self._of_head == other._of_head
            and bool(tensors)
            and all(self.checkpoint.same(tensor, other.checkpoint) for tensor in tensors)
        )

    @property
    def _of_head(self) -> list[str]:
        """Parameters of what comes after the model that the family calls its base."""
        base = set(self._outside(self.model.base_model))
        return [name for name in self.outside if name not in base]

    @torch.no_grad()
    def _finish(self, part: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        self._load(self._outside(part))
        for hidden, tokens in list(zip(self.hidden, self.batches, strict=True))[1:]:
            with (
                self._standing_in(lambda _, hidden=hidden: lambda *args, **kwargs: self.returned(hidden)),
                skeleton.refusing(self.checkpoint, "run"),
            ):
                out = part(input_ids=tokens.to(self.device), use_cache=False)
            yield tokens, out
        skeleton.release(self.model, self.outside)

    def _outside(self, part: nn.Module) -> list[str]:
        prefix = next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is part)
        return [name for name in self.outside if name.startswith(prefix)]

    def _load(self, names: list[str]) -> None:
        skeleton.load(self.model, self.checkpoint, self.places, self.ties, names, self.device)


class Notes:
    """Stand-ins for all blocks of one pass: they note what each is called with, and that hidden states are all that passes between them."""

    def __init__(self, walk: Walk, forward: Callable | None):
        """`forward`: the first block's own, to see what it returns."""
        self.walk, self.forward, self.done = walk, forward, 0
        self.handed: Tensor | None = None

    def __call__(self, number: int) -> Callable:
        def stand_in(hidden: Tensor, *args, **kwargs) -> Any:
            if number != self.done:
                self._refuse("calls its blocks in another order than they stand in")
            self.done += 1
            if number == 0:
                self.walk.require_finite(hidden, "what comes before the first block computes")
                if self.forward is not None:
                    self._learn(
                        self.forward(
                            hidden, *args, **{name: value for name, value in kwargs.items() if name not in DROPPED}
                        ),
                        hidden,
                    )
                self.walk.hidden.append(self.walk.kept(hidden))
            elif (
                hidden.shape != self.walk.hidden[-1].shape
                or self.handed is None
                or hidden.data_ptr() != self.handed.data_ptr()
            ):
                self._refuse("computes something between its blocks")
            args = tuple(self._carried(value) for value in args)
            kwargs = {name: self._carried(value) for name, value in kwargs.items() if name not in DROPPED}
            self.walk.calls[self.walk.blocks[number].module].append((args, kwargs))
            self.handed = hidden
            return self.walk.returned(hidden)

        return stand_in

    def _learn(self, out: Any, hidden: Tensor) -> None:
        """What a block returns beside its hidden states is poisoned: where it is used, it shows."""
        first, *others = out if isinstance(out, (tuple, list)) else [out]
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            self._refuse("has blocks that return something else than hidden states")
        if isinstance(out, (tuple, list)):
            self.walk._returned = [
                skeleton.poison(x) if isinstance(x, Tensor) else None if x is None else Carried(i)
                for i, x in enumerate(others)
            ]

    def _carried(self, value: Any) -> Any:
        """An argument as it is to be noted: what the block before has returned is known when that has run."""
        for number, other in enumerate(self.walk._returned or ()):
            if other is not None and other is value:
                return Carried(number)
        if self.forward is not None and isinstance(value, Tensor) and skeleton.is_poisoned(value):
            self._refuse("computes with more than hidden states between its blocks")
        return value

    def close(self) -> None:
        if self.done != len(self.walk.blocks):
            self._refuse(f"runs {self.done} of its {len(self.walk.blocks)} blocks")

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(
            f"'{self.walk.checkpoint.model_type}' {what}, which calibration and eval do not follow; {skeleton.NO_MODEL}"
        )
