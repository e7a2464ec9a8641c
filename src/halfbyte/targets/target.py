"""Target: a form of output, and all that it knows: words, grids, casts, files. To add one: a folder, and a line."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.grid import Shape
from halfbyte.grids.kv import KVGrid
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.weight import Weight
from halfbyte.recipe import Method, Recipe
from halfbyte.registry import FORMS
from halfbyte.targets import choosing
from halfbyte.targets.constraints import EACH, Rule, TiedGroup, stacks
from halfbyte.targets.plan import Plan


class Target(ABC):
    """What a quantized model is written as. Targets are values: what one is asked changes nothing in it."""

    marks: ClassVar[tuple[str, ...]] = ()
    """Files, as patterns, by which a folder of it is known."""
    recipe_fields: ClassVar[frozenset[str]] = frozenset()
    """Entries of a recipe that mean something to this target alone."""
    default_grid: ClassVar[str | None] = None
    """Where no grid is named; None: that of every recipe."""
    library: ClassVar[str] = "transformers"
    """What the hub says that reads it."""
    candidates: ClassVar[tuple[str, ...]] = ()
    """Grids among which a budget chooses, where none are named."""
    alignment: ClassVar[int] = 1
    """Bytes of which each tensor in a file takes a multiple."""
    has_presets: ClassVar[bool] = False
    """Whether some of its grids are mixtures that have a name."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As `--to` has it."""

    @property
    def mixes(self) -> bool:
        """Whether one output may hold several grids."""
        return True

    @property
    def title(self) -> str:
        """As sentences have it."""
        return self.name

    @property
    def file_suffix(self) -> str | None:
        """Of an output that is one file, with its report beside it; None: outputs are folders."""
        return FORMS[self.name].suffix or None if self.name in FORMS else None

    # Words --------------------------------------------------------------------------------------------------

    def require_name(self, name: str, mixture: bool) -> None:
        """Raise UnknownName for a word that is no grid, nor, where a mixture is wanted, a preset."""
        schemes.parse(name)
        if not mixture and schemes.is_mixture(name):
            raise BadRequest(f"'{name}' is several schemes, each for some weights; name one, such as nvfp4 or fp8")

    def means(self, name: str) -> str:
        """The grid that is meant by a name where this target is written: its own names come first."""
        return name

    def prefers(self, name: str, scheme: Scheme | None) -> bool:
        """Whether a grid that is called so is meant for this target, if none is asked for."""
        return False

    def label(self, plan: Plan) -> str:
        """What most of an output is."""
        named = [self.grid_name(scheme) for scheme in plan.schemes.values()]
        return max(named, key=named.count) if plan.recipe.method == "convert" and named else plan.recipe.grid

    def grid_name(self, scheme: Scheme) -> str:
        """As readers of the output call it."""
        return str(scheme)

    # What becomes of a matrix -------------------------------------------------------------------------------

    def for_model(self, dtype: torch.dtype) -> "Target":
        """The version of this target for models that engines compute in `dtype`."""
        return self

    def for_tensor(self, q: Quantized) -> "Target":
        """The version of this target that holds such a matrix too."""
        return self

    @abstractmethod
    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """`scheme` with scales in the precision that engines compute with when the model is of `dtype`, and with the
        activations that they round whether asked or not."""

    @abstractmethod
    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported, saying what the target can hold, unless it holds such a matrix."""

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """A matrix from elsewhere, value for value on a grid that this may hold; None where it must be rounded."""
        return None

    def casts(self, q: Quantized) -> Iterator[Quantized]:
        """What a matrix from elsewhere may become without being rounded anew: first value for value, then nearly so."""
        if exact := self.cast_exact(q):
            yield exact

    @abstractmethod
    def specs(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Suffix, shape and dtype of every tensor that `pack` will return."""

    @abstractmethod
    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """The tensors to write, by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """The inverse of `pack`."""

    def ties(self, checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[TiedGroup]:
        """Which weights' schemes depend on one another in an output, whoever reads it."""
        others = f"{self.name} holds one scheme for all weights, not {EACH}; compressed-tensors and gptq mix them"
        whole = [] if self.mixes else [TiedGroup(tuple(weights), Rule.ONE_SCHEME, others)]
        return [*stacks(weights), *whole]

    # What becomes of a checkpoint ---------------------------------------------------------------------------

    def plan(self, recipe: Recipe, checkpoint: Checkpoint, method: Method) -> Plan:
        """What quantizing makes of every tensor. Raises HalfbyteError for words and shapes that do not fit."""
        return choosing.quantizing(self.for_model(checkpoint.dtype), recipe, checkpoint, method)

    def convert(self, recipe: Recipe, checkpoint: Checkpoint, grid: str | None) -> Plan:
        """What moving a quantized checkpoint makes of every tensor; `grid`: where values cannot stay."""
        return choosing.converting(self.for_model(checkpoint.dtype), recipe, checkpoint, grid)

    def decode(self, recipe: Recipe, checkpoint: Checkpoint) -> Plan:
        """What writing every tensor in the dtype that is the recipe's grid makes of it."""
        raise Unsupported(f"16 bits are not written as {self.name}")

    def require_cache(self, grid: KVGrid) -> None:
        """Raise Unsupported unless engines read the scales of such a KV cache beside this target's weights."""
        raise Unsupported(f"{self.title} stores nothing of a KV cache")

    @abstractmethod
    def writer(self, plan: Plan) -> "CheckpointWriter":
        """What lays a plan's output out and writes it."""


class TensorRows(NamedTuple):
    """A tensor of the output, or rows of its leading dimension."""

    name: str
    tensor: Tensor
    at: int | None = None
    """The first of these rows; None for the whole tensor."""


class CheckpointWriter(ABC):
    """Which tensors of a plan's output lie where, and what beside them: by default under the checkpoint's names."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def tensors(self) -> dict[str, Spec]:
        """Every tensor of the output, in the order of the source."""
        plan, tensors = self.plan, dict[str, Spec]()
        by_tensor: dict[str, list[Weight]] = {}
        specs_of = cache(plan.target.specs)  # of a mixture's thousands of matrices that are alike
        for weight in plan.schemes:
            by_tensor.setdefault(weight.tensor, []).append(weight)
        for tensor in plan.checkpoint.tensors():
            if tensor in plan.unquantized:
                tensors[tensor] = plan.spec(tensor)
            for weight in by_tensor.get(tensor, []):
                specs = specs_of(plan.schemes[weight], weight.shape)
                tensors.update({f"{weight.name}.{suffix}": spec for suffix, spec in specs.items()})
        return {**tensors, **plan.scales}

    @abstractmethod
    def shards(self, stem: str) -> dict[str, Shard]:
        """Every file of tensors, laid out from shapes alone; `stem` is the output's own name."""

    def row_chunks(self, weight: Weight, size: int) -> list[Weight]:
        """Runs of a matrix's rows that can be read, rounded and written each by itself, in order: of about `size`
        weights where it can be cut."""
        return [weight]

    def pack(self, weight: Weight, q: Quantized) -> Iterator[TensorRows]:
        """What is written of a matrix."""
        for suffix, tensor in self.plan.target.pack(q).items():
            yield TensorRows(f"{weight.name}.{suffix}", tensor)

    def unpack(self, entries: Mapping[str, Entry], weight: Weight, scheme: Scheme) -> Quantized:
        """The inverse of `pack`, from a file."""
        suffixes = self.plan.target.specs(scheme, weight.shape)
        tensors = {suffix: entries[f"{weight.name}.{suffix}"].read() for suffix in suffixes}
        return self.plan.target.unpack(tensors, scheme, weight.shape)

    def pack_unquantized(self, tensor: str, value: Tensor) -> Iterator[TensorRows]:
        """What is written of a tensor that is not quantized."""
        yield TensorRows(tensor, value)

    def precision(self, tensor: str) -> torch.dtype:
        """What an unquantized tensor may be as precise as: that of the file, where it holds the numbers themselves."""
        return self.plan.spec(tensor).dtype

    def read_unquantized(self, entries: Mapping[str, Entry], tensor: str) -> list[Tensor]:
        """What `pack_unquantized` wrote, from a file."""
        return [entries[tensor].read()]

    def restored(self, entries: Mapping[str, Entry], tensor: str) -> Tensor:
        """The value that `pack_unquantized` was given, from a file."""
        return entries[tensor].read()

    def entry_file(self, stem: str) -> str | None:
        """The file that engines are given; None where they are given the folder."""
        return None

    def extra(self) -> Iterator[TensorRows]:
        """Tensors of the output that no tensor of the checkpoint becomes."""
        yield from ()

    @abstractmethod
    def write_sidecars(self, folder: Path) -> None:
        """Write what else belongs to the output, and is not a report."""

    @abstractmethod
    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        """The headers of a finished folder, as any reader sees them. Raises BrokenOutput if it lacks a matrix."""


def read_rows(entry: Entry, first: int | None) -> Tensor:
    """A tensor in a file: all of it, or its one row `first`."""
    return entry.read() if first is None else entry.read(first, first + 1)


def split(specs: Mapping[str, Spec], limit: float) -> list[dict[str, Spec]]:
    """Parts of at most `limit` bytes, in order; a tensor that is larger is a part of its own."""
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.size_bytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.size_bytes
    return parts
