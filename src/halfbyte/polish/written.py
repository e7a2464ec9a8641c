"""What a run has written, as the source of a model's tensors, with numbers that are tuned in place of some of it."""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import Quantized
from halfbyte.models.block import Block
from halfbyte.models.mapping import WeightMap
from halfbyte.models.weight import Weight
from halfbyte.run import Run


class Written:
    """Whoever reads it gets what the file would hold; gradients pass that rounding as if there were none (straight
    through)."""

    def __init__(self, run: Run, weight_map: WeightMap, parameters: Container[str], room: int):
        """`parameters`: names of what gradients can be had of. `room`: bytes for codes that are kept in memory; if all
        of them need more, each is read from the file whenever it is asked for."""
        self.plan, self.writer, self.entries, self.device = (
            run.plan,
            run.checkpoint_writer,
            run.folder.entries,
            run.device,
        )
        self.weight_map = weight_map
        self._owner = {weight: group[0] for group in self.plan.fused_groups for weight in group}
        self._of_tensor: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.plan.schemes:
            self._of_tensor[weight.tensor].append(weight)
        self._read: dict[Weight, Quantized] = {}
        self._keeps = sum(prod(weight.shape) for weight in self.plan.schemes) <= room
        self.vectors = [tensor for tensor in self.plan.unquantized if self._is_tuned(tensor, parameters)]
        """Tensors that are not quantized and are tuned: norms and biases."""
        self.numbers = {name: value.to(self.device, copy=True).requires_grad_() for name, value in self._found()}
        """By the tensor, or the weight and the parameter, that they are of."""

    @property
    def bits(self) -> float:
        """Of a weight, scales and all: the mean over blocks."""
        sizes = {weight: prod(weight.shape) for weight in self.plan.schemes if weight.block}
        bits = sum(self.plan.schemes[weight].weight.bits(weight.shape) * size for weight, size in sizes.items())
        return bits / max(1, sum(sizes.values()))

    def _is_tuned(self, tensor: str, parameters: Container[str]) -> bool:
        spec, place = self.plan.checkpoint.spec(tensor), self.weight_map.get(tensor)
        return (
            place is not None
            and place.parameter in parameters
            and len(spec.shape) == 1
            and spec.dtype.is_floating_point
        )

    def _found(self) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.vectors:
            yield tensor, self.writer.restored(self.entries, tensor).float()
        for weight in self.plan.schemes:
            if weight.block:
                q = self._unpacked(weight)
                for name, value in q.grid.numbers(q.params).items():
                    if name in q.grid.row_params(q.shape) or self._owner[weight] == weight:
                        yield self._key(q, weight, name), value

    def _unpacked(self, weight: Weight) -> Quantized:
        if weight in self._read:
            return self._read[weight]
        q = self.writer.unpack(self.entries, weight, self.plan.schemes[weight])
        params = {name: value.to(self.device) for name, value in q.params.items()}
        q = q._replace(codes=q.codes.to(self.device), params=params)
        if self._keeps:
            self._read[weight] = q
        return q

    def _key(self, q: Quantized, weight: Weight, name: str) -> str:
        """What all rows share is one number for all weights that engines fuse."""
        return f"{(weight if name in q.grid.row_params(q.shape) else self._owner[weight]).name} {name}"

    def quantized(self, weight: Weight) -> Quantized:
        """A matrix with the numbers as the file would hold them."""
        q = self._unpacked(weight)
        names = q.grid.numbers(q.params) if weight.block else ()
        numbers = {name: self.numbers[self._key(q, weight, name)].detach() for name in names}
        return q._replace(params=q.grid.nearest_params(q.params, numbers)) if numbers else q

    def vector(self, tensor: str) -> Tensor:
        """A tensor that is not quantized and is tuned, as the file would hold it."""
        return self.numbers[tensor].detach().to(self.writer.precision(tensor))

    def read(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint, as the file would hold it."""
        if tensor in self.numbers:
            return self.vector(tensor).float()
        if tensor not in self._of_tensor:
            return self.writer.restored(self.entries, tensor)
        value = torch.empty(self.plan.checkpoint.tensors()[tensor], device=self.device)
        for weight in self._of_tensor[tensor]:
            view = value if weight.expert is None else value[weight.expert]
            (view.T if weight.transposed else view).copy_(self.quantized(weight).decode())
        return value

    def back(self, block: Block | None, gradients: Mapping[str, Tensor]) -> None:
        """Add to the gradients of numbers what those of parameters make of them: of a block, or of what is around
        the blocks."""
        shapes = self.plan.checkpoint.tensors()
        for tensor, place in self.weight_map.items():
            if place.parameter not in gradients:
                continue
            gradient = gradients[place.parameter]
            if tensor in self.numbers:
                _add(self.numbers[tensor], place.view(gradient, shapes[tensor]))
            if block is not None:
                for weight in self._of_tensor.get(tensor, ()):
                    self._back(weight, block.weight(weight, gradient))

    def _back(self, weight: Weight, gradient: Tensor) -> None:
        q = self.quantized(weight)
        numbers = {name: value.clone().requires_grad_() for name, value in q.grid.numbers(q.params).items()}
        if not numbers:
            return
        with torch.enable_grad():
            values = q.grid.expand(q.codes, q.params, numbers)
        for name, found in zip(numbers, torch.autograd.grad(values, list(numbers.values()), gradient), strict=True):
            _add(self.numbers[self._key(q, weight, name)], found)

    def take(self, numbers: Params) -> None:
        """From now on these are the numbers."""
        for name, value in numbers.items():
            self.numbers[name].data.copy_(value)


def _add(number: Tensor, gradient: Tensor) -> None:
    number.grad = gradient.clone() if number.grad is None else number.grad.add_(gradient)
