"""Container: how the bits of a Quantized lie in a folder of safetensors, and how its config.json says so.

A container moves bits and never does arithmetic on weights: `unpack(pack(q), q.scheme, q.shape) == q`. All of them are
values: what one is asked changes nothing in it.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ActivationGrid, ActivationQuant
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import ScalarGrid, is_integer

Config = dict[str, Any]
STORED_INPUTS = {
    "scale": ("input_scale", torch.float32),
    "zero": ("input_zero_point", torch.int8),
    "divisor": ("input_global_scale", torch.float32),
}
"""Suffix and dtype of what is stored of a module's inputs."""
ONE: tuple[Shape, ...] = ((1,), ())
"""Shapes of a single number."""
SCALES = (torch.float32, torch.float16, torch.bfloat16)


Has = Callable[[str], bool]
Modules = dict[str, tuple[Scheme, Shape]]
"""Scheme and shape by module."""


class PartSpec(NamedTuple):
    """What a tensor of a module may be in a file, whoever wrote it."""

    specs: tuple[Spec, ...]
    optional: bool = False


def any_of(shapes: Collection[Shape], dtypes: Collection[torch.dtype], optional: bool = False) -> PartSpec:
    """A part that may have any of these shapes and dtypes."""
    return PartSpec(tuple(Spec(shape, dtype) for shape in shapes for dtype in dtypes), optional)


class Reader(ABC):
    """One layout of quantized matrices, as far as it is read: whoever wrote it, and whether it is written here or not.

    Modules are named without their `.weight`; tensors of a module by the suffix that follows `module.`.
    """

    name: str
    foreign_suffixes: tuple[str, ...] = ()
    """Suffixes of tensors that belong to a module in files of others."""

    @abstractmethod
    def reads(self, config: Config) -> bool:
        """Whether a `quantization_config` is of this layout."""

    def unfuse_experts(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors of a checkpoint, those that several modules share (fused experts) cut up."""
        return dict(entries)

    @abstractmethod
    def find(self, config: Config, entries: Mapping[str, Entry]) -> Modules:
        """Scheme and shape of every quantized module of a checkpoint."""

    def opened(self, config: Config, entries: Mapping[str, Entry]) -> tuple["Reader", Modules]:
        """The version of this layout that a checkpoint is in, and what `find` finds."""
        return self, self.find(config, entries)

    def suffixes(self, scheme: Scheme, shape: Shape) -> set[str]:
        """Of the tensors that such a module may have."""
        return set(self.foreign_suffixes)

    @abstractmethod
    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """What the tensors of such a module may be, by suffix. `has` tells whether a module has a tensor of a
        suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """A matrix, from the tensors of its module."""

    def inputs(self, tensors: Mapping[str, Tensor], grid: ActivationGrid | None) -> ActivationQuant | None:
        """How what the matrix is multiplied by is rounded, from its tensors."""
        return inputs_of(tensors, grid)


class Container(Reader):
    """A layout that is written too. `unpack` is the inverse of `pack`."""

    mixes = True
    """Whether one checkpoint may hold several grids."""

    def for_model(self, dtype: torch.dtype) -> "Container":
        """The version of this container for models that engines compute in `dtype`."""
        return self

    @abstractmethod
    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """`scheme` with scales in the precision that engines compute with when the model is of `dtype`, and with the
        inputs that they round whether asked or not."""

    @abstractmethod
    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported, saying what the container can hold, unless it holds such a matrix."""

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """A matrix from elsewhere, value for value on a grid that this container may hold; None where it must be
        rounded."""
        return q._replace(activations=None) if is_integer(q.grid) else None

    def for_tensor(self, q: Quantized) -> "Container":
        """The version of this container that holds such a matrix too."""
        return self

    @abstractmethod
    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Suffix, shape and dtype of every tensor that `pack` will return."""

    def suffixes(self, scheme: Scheme, shape: Shape) -> set[str]:
        """Those of `plan`, and those that files of others have."""
        return {*self.plan(scheme, shape), *self.foreign_suffixes}

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """Those of `plan`, and where others write them otherwise, that."""
        return {suffix: PartSpec((spec,)) for suffix, spec in self.plan(scheme, shape).items()}

    @abstractmethod
    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """The tensors to write, by suffix."""

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """`quantization_config` for these modules; `unquantized` are linear modules left as they were."""

    def extra_files(self, config: Config) -> dict[str, Config]:
        """Further JSON files that readers of this container look for."""
        return {}


def require_parts(
    module: str, scheme: Scheme, shape: Shape, parts: Mapping[str, PartSpec], entries: Mapping[str, Spec]
) -> None:
    """Raise BadCheckpoint unless every tensor of a module is what its container may hold of such a matrix."""
    if len(shape) != 2 or min(shape) < 1:
        raise BadCheckpoint(f"{module} is said to be {scheme} of {list(shape)}, which is no matrix")
    for suffix, part in parts.items():
        name = f"{module}.{suffix}"
        if name not in entries:
            if not part.optional:
                raise BadCheckpoint(
                    f"'{name}' is not stored, and {module} is said to be {scheme}; the checkpoint is not whole"
                )
        elif Spec(entries[name].shape, entries[name].dtype) not in part.specs:
            wanted = part.specs[0]
            raise BadCheckpoint(
                f"'{name}' is {described(entries[name])}, and {scheme} of {shape[0]} x {shape[1]} has "
                f"{described(wanted)} there; download it again"
            )


def stored(entries: Mapping[str, Entry], name: str, dtypes: Collection[torch.dtype], dimensions: int = 2) -> Entry:
    """A tensor that a module of quantized weights cannot do without. Raises BadCheckpoint."""
    entry = entries.get(name)
    if entry is None:
        raise BadCheckpoint(f"'{name}' is not stored; the checkpoint is not whole")
    if entry.dtype not in dtypes or len(entry.shape) != dimensions or 0 in entry.shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadCheckpoint(f"'{name}' is {described(entry)}, which should have {dimensions} dimensions of {kinds}")
    return entry


def described(spec: Spec) -> str:
    """Dtype and shape, as messages have them."""
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def weights_only(scheme: Scheme, container: str) -> Grid:
    """The grid of a scheme whose activations stay in 16 bits. Raises Unsupported, naming the container, for others."""
    if scheme.activations:
        raise Unsupported(
            f"{container} has no inputs of fewer than 16 bits, such as {scheme}; compressed-tensors has, or leave "
            f"{scheme.weight} alone"
        )
    return scheme.weight


def integer(scheme: Scheme, container: str) -> ScalarGrid:
    """The integer grid of a scheme of weights alone. Raises Unsupported, naming the container, for others."""
    grid = weights_only(scheme, container)
    if isinstance(grid, ActOrderGrid):
        raise Unsupported(
            f"{container} is written with groups of neighbouring in-features only, not with those of {grid}"
        )
    if not is_integer(grid):
        raise Unsupported(f"{container} holds integer grids only, not {grid}")
    return grid


def input_specs(grid: ActivationGrid | None) -> dict[str, Spec]:
    """One number each, as compressed-tensors and vLLM name them."""
    return {STORED_INPUTS[name][0]: Spec((1,), STORED_INPUTS[name][1]) for name in (grid.stored if grid else ())}


def input_parts(grid: ActivationGrid | None) -> dict[str, PartSpec]:
    """As `input_specs`; others store them without a dimension too, and in the dtype of the model."""
    kinds = {"zero": (torch.int8,)}
    return {STORED_INPUTS[name][0]: any_of(ONE, kinds.get(name, SCALES)) for name in (grid.stored if grid else ())}


def input_tensors(inputs: ActivationQuant | None) -> dict[str, Tensor]:
    """What is stored of a module's activations, by suffix."""
    return {
        STORED_INPUTS[name][0]: value.to(STORED_INPUTS[name][1])
        for name, value in (inputs.params if inputs else {}).items()
    }


def inputs_of(tensors: Mapping[str, Tensor], grid: ActivationGrid | None) -> ActivationQuant | None:
    """The inverse of `input_tensors`. Raises BadCheckpoint where what should be stored is not."""
    if grid is None:
        return None
    if lost := [STORED_INPUTS[name][0] for name in grid.stored if STORED_INPUTS[name][0] not in tensors]:
        raise BadCheckpoint(f"inputs are said to be {grid}, whose {lost[0]} is not stored; the checkpoint is not whole")
    return ActivationQuant(grid, {name: tensors[STORED_INPUTS[name][0]].float().view(1) for name in grid.stored})


def granularity_of(module: str, width: int, groups: int, sizes: Collection[Any]) -> int | str:
    """What shares a scale, from shapes; a row of one group is a channel unless the config speaks of groups that wide.

    Raises BadCheckpoint for groups that do not divide the row, or that are of none of the sizes that the config names.
    """
    named = [size for size in sizes if type(size) is int and size > 0]
    if not groups or width % groups or (groups > 1 and named and width // groups not in named):
        in_config = f", and config.json has groups of {' and '.join(map(str, named))}" if named else ""
        raise BadCheckpoint(
            f"{module} has {groups} scales for each row of {width}{in_config}; its tensors or its config are of "
            "another model"
        )
    return width // groups if groups > 1 or width in named else "channel"


def commonest(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most modules."""
    return Counter(schemes.values()).most_common(1)[0][0]


def patterns(chosen: list[str], others: list[str]) -> list[str]:
    """Regular expressions that match every name in `chosen` and none in `others`, few where layers repeat."""
    foreign = {_collapse(name) for name in others}
    expressions: dict[str, None] = {}
    for name in chosen:
        expressions[re.escape(name) if _collapse(name) in foreign else _collapse(name)] = None
    return list(expressions)


def _collapse(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def fits_half(scale: Tensor) -> bool:
    """Whether every scale is exact in fp16."""
    return torch.equal(scale.to(torch.float16).to(scale.dtype), scale)


def exact_half(scale: Tensor) -> Tensor:
    """Scales in fp16. Raises Unsupported where that would round one."""
    if not fits_half(scale):
        raise Unsupported(
            "a scale does not fit fp16, the only precision of this container; scale the model or use compressed-tensors"
        )
    return scale.to(torch.float16)
