"""Linears that multiply by packed weights as they are, in place of those that decode them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import inf, prod
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from halfbyte.devices import kind_of
from halfbyte.formats import Activations
from halfbyte.grids.quantized import ROOM
from halfbyte.kernels.panels import Panels, product, stacked, worth_making
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.names import fused_set
from halfbyte.packed import PackedModule, QuantEmbedding, QuantLinear

FEW = 8
"""Tokens for which siblings multiply together."""
SHARE = 0.6
"""Of the free memory, which decoded weights may take."""


class PanelLinear(PackedModule):
    """A linear that multiplies by a packed weight as it is."""

    bias: nn.Parameter | None

    def __init__(self, matrix: Panels, bias: Tensor | None, dtype: torch.dtype, activations: Activations = "exact"):
        super().__init__(matrix, dtype)
        self.activations: Activations = activations
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.siblings: Siblings | None = None
        self.number = 0
        """Among its siblings."""

    @property
    def matrix(self) -> Panels:
        """In panels."""
        return cast(Panels, super().matrix)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x W^T + bias."""
        if x.requires_grad or torch.compiler.is_compiling():
            # No gradient comes through a kernel, and no compiler looks into one.
            return functional.linear(x, self.weight, self.bias)
        *before, width = x.shape
        if self.siblings is not None and x.numel() <= FEW * width and self.matrix is self.siblings.parts[self.number]:
            y = self.siblings.product(x, self.number)
        else:
            y = product(x.reshape(-1, width), self.matrix, self._parameters["bias"], self.activations)
        return y.view(*before, y.shape[1])


class Siblings:
    """Linears that read the same one after another, such as those of queries, keys and values: the first multiplies for
    all of them, since of a token a product is begun almost as long as it takes."""

    def __init__(self, linears: Sequence[PanelLinear], whole: Panels, parts: Sequence[Panels]):
        """`parts`: of `whole`, one for each."""
        self.parts, self._whole = parts, whole
        self._activations: Activations = linears[0].activations
        ends = list(accumulate(part.shape[0] for part in parts))
        self._rows = [slice(end - part.shape[0], end) for end, part in zip(ends, parts, strict=True)]
        biases = [linear.bias for linear in linears]
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = whole.tensors["scale"].new_zeros(ends[-1], dtype=torch.float32)
            for bias, rows in zip(biases, self._rows, strict=True):
                self._bias[rows] = 0 if bias is None else bias
        self._kept: tuple[Tensor, Tensor, int] | None = None
        """What was read, all products with it, and how many wait for theirs."""
        for number, linear in enumerate(linears):
            linear.siblings, linear.number = self, number

    def product(self, x: Float[Tensor, "... in"], number: int) -> Float[Tensor, "tokens out"]:
        """That of one of them."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is x:
            _, products, waiting = kept
        else:
            products = product(x.reshape(-1, x.shape[-1]), self._whole, self._bias, self._activations)
            waiting = len(self.parts)
        if waiting > 1:
            self._kept = x, products, waiting - 1
        return products[:, self._rows[number]].contiguous()


def multiply_packed(model: nn.Module, activations: Activations, room: float = ROOM) -> None:
    """Have linears multiply by packed weights as they are, where a kernel does that with panels of at most `room` times
    the bits of the file; embeddings that are tied to them look up the same panels."""
    sharing: dict[int, dict[str, PackedModule]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, QuantEmbedding) or (isinstance(module, QuantLinear) and module.activations is None):
            sharing[id(module.packed_0)][name] = module
    made: dict[int, PanelLinear] = {}
    for together in _siblings(list(sharing.values())):  # of no other matrices are there two forms at a time
        _multiply_together(together, activations, room, made)
    _exchange(model, lambda linear: made.get(id(linear), linear))


def _siblings(sharing: list[dict[str, PackedModule]]) -> Iterator[list[list[PackedModule]]]:
    """Modules that share a matrix, with those whose matrix engines make one of theirs."""
    sets: dict[object, list[list[PackedModule]]] = {}
    for modules in sharing:
        first = next(iter(modules))
        key = (fused_set(first) if len(modules) == 1 else None) or first
        sets.setdefault(key, []).append(list(modules.values()))
    yield from sets.values()


def _multiply_together(
    together: list[list[PackedModule]], activations: Activations, room: float, made: dict[int, PanelLinear]
) -> None:
    """Make linears of some matrices, and of those one whose panels are alike."""
    alike: dict[object, list[tuple[list[PackedModule], Panels]]] = {}
    for modules in together:
        linears = [module for module in modules if isinstance(module, QuantLinear)]
        if linears and worth_making(linears[0].like) and (panels := linears[0].matrix.quantized.panels(room)):
            alike.setdefault(panels.kind, []).append((modules, panels))
    for owners in alike.values():
        parts = [panels for _, panels in owners]
        whole = stacked(parts[0].tensors["codes"], parts)
        parts, siblings = whole.split([part.shape[0] for part in parts]), []
        for (modules, _), part in zip(owners, parts, strict=True):
            for module in modules:
                if isinstance(module, QuantLinear):
                    siblings.append(PanelLinear(part, module.bias, module.dtype, activations))
                    made[id(module)] = siblings[-1]
                module.hold(part)
        if len(parts) > 1:
            Siblings(siblings, whole, parts)


def multiplies_packed(model: nn.Module) -> bool:
    """Whether all linears do."""
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear | QuantLinear | PanelLinear)}
    return kinds == {PanelLinear}


def unpack(model: nn.Module) -> None:
    """Have linears hold their decoded weights. Memory is that of a model which was never packed."""
    _exchange(model, lambda linear: linear if linear.activations else _dense(linear))


def ready_to_answer(
    model: nn.Module, checkpoint: Checkpoint, where: torch.device, activations: Activations = "exact"
) -> None:
    """Have linears multiply by packed weights, in panels that may be larger than the file; or, where no kernel does
    that, hold their decoded weights if there is memory for them: to decode takes longer than to multiply with few
    tokens."""
    multiply_packed(model, activations, inf)
    decoded = sum(prod(shape) for _, shape in checkpoint.quantized.values()) * checkpoint.unquantized_dtype.itemsize
    if decoded <= SHARE * kind_of(where).free_bytes(where):
        unpack(model)


def _exchange(model: nn.Module, make: Callable[[QuantLinear], nn.Module]) -> None:
    """Of linears that several modules share, one is made."""
    made: dict[int, nn.Module] = {}
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if isinstance(linear, QuantLinear):
            if id(linear) not in made:
                made[id(linear)] = make(linear)
            model.set_submodule(name, made[id(linear)])


def _dense(linear: QuantLinear) -> nn.Module:
    """With the decoded weight."""
    weight = linear.weight
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = linear.bias
    return dense
