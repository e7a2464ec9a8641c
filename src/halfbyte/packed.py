"""Modules that hold their weights packed, as they lie in a file or in panels, and compute with them decoded."""

from collections.abc import Callable
from types import new_class
from typing import cast

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from halfbyte.devices import multiplies_float8
from halfbyte.grids.activations import FLOATS, ActivationGrid, ScaledActivations
from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import PackedMatrix, Quantized
from halfbyte.grids.scalar import ScalarGrid, is_integer
from halfbyte.kernels.panels import Panels
from halfbyte.kernels.products import float8_product, int8_product

STORED = ("packed_", "input_")
"""What buffers of a file's own values are called."""


class PackedModule(nn.Module):
    """Holds a matrix in panels that kernels multiply by, or as it lies in its file, bit for bit."""

    like: Tensor
    packed_0: Tensor

    def __init__(self, matrix: PackedMatrix | Panels, dtype: torch.dtype):
        nn.Module.__init__(self)
        self._names: list[str] = []
        self.hold(matrix)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def hold(self, matrix: PackedMatrix | Panels) -> None:
        """This matrix, in place of the one before."""
        for number, _ in enumerate(self._names):
            del self._buffers[f"packed_{number}"]
        self._matrix, self._names = matrix, list(matrix.tensors)
        for number, value in enumerate(matrix.tensors.values()):
            self.register_buffer(f"packed_{number}", value)

    @property
    def matrix(self) -> PackedMatrix | Panels:
        """Of these buffers, whatever has become of them."""
        if self._buffers["packed_0"] is not self._matrix.tensors[self._names[0]]:  # all of them move together
            tensors = {name: getattr(self, f"packed_{number}") for number, name in enumerate(self._names)}
            self._matrix = self._matrix.holding(tensors)
        return self._matrix

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return self.like.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """As all modules do, but for what is stored: `.half()` changes what it computes in, and no scale."""
        stored = self._stored()
        super()._apply(fn, recurse)
        for name, before in stored.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def _stored(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._buffers.items() if name.startswith(STORED) and b is not None}

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Decoded, for models whose code looks at it. Changing it changes nothing."""
        return self.matrix.decode().to(self.dtype)


class QuantEmbedding(PackedModule, nn.Embedding):
    """An embedding whose rows stay packed but for those that are looked up."""

    @classmethod
    def of(cls, before: nn.Embedding, matrix: PackedMatrix | Panels, dtype: torch.dtype) -> "QuantEmbedding":
        """`before` with a packed matrix. What its own class makes of the rows that it looks up, such as scaling them,
        stays: that class comes first, and its `super().forward` is ours."""
        kind = type(before)
        made = object.__new__(cls if kind is nn.Embedding else new_class(f"Quant{kind.__name__}", (kind, cls)))
        PackedModule.__init__(made, matrix, dtype)
        ours = {
            "_parameters": {name: p for name, p in before._parameters.items() if name != "weight"},
            "_buffers": made._buffers | before._buffers,
            "_non_persistent_buffers_set": made._non_persistent_buffers_set | before._non_persistent_buffers_set,
        }
        made.__dict__ |= vars(before) | ours
        return made

    def forward(self, input: Int64[Tensor, "*tokens"]) -> Float[Tensor, "*tokens in"]:
        """The rows of these tokens, decoded."""
        rows, which = input.unique(return_inverse=True)
        return self.matrix.rows(rows).to(self.dtype)[which]

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Decoded as soon as something is computed with it: models ask it for its dtype at every step."""
        return Undecoded.of(self)


class Undecoded(Tensor):
    """The weight of an embedding that may be looked at (of which kind, on which device) and is decoded only for what
    computes with it."""

    embedding: QuantEmbedding

    @classmethod
    def of(cls, embedding: QuantEmbedding) -> "Undecoded":
        """The weight of a packed module, which nothing has asked for yet."""
        shape = embedding.num_embeddings, embedding.embedding_dim
        made = Tensor._make_subclass(cls, embedding.like.new_full((1, 1), torch.nan).expand(shape))
        made.embedding = embedding
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """As of any tensor: what comes of it is none of these."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def decoded(self) -> Float[Tensor, "out in"]:
        """The weight itself."""
        return self.embedding.matrix.decode().to(self.embedding.dtype)


class QuantLinear(PackedModule):
    """A linear whose weight stays packed as in its file, and whose input is rounded as engines do; the reference:
    unpack, decode, multiply."""

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(matrix, dtype)
        q = matrix.quantized
        self.activations, self.stored = (
            (q.activations.grid, list(q.activations.params)) if q.activations else (None, [])
        )
        for name, value in (q.activations.params if q.activations else {}).items():
            self.register_buffer(f"input_{name}", value)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> PackedMatrix:
        """As it lies in its file."""
        return cast(PackedMatrix, super().matrix)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x W^T + bias, with x rounded where the scheme says so."""
        if (
            self.activations is None or not x.numel()
        ):  # of no tokens, such as those of an idle expert, there is no largest
            return functional.linear(x, self.weight, self.bias)
        params = self.activations.params(x, {name: getattr(self, f"input_{name}") for name in self.stored})
        q = self.matrix.quantized
        y = _product_of_codes(x, self.activations, params, q)
        if y is None:
            y = functional.linear(self.activations.round(x, params), q.decode())
        y = y.to(self.dtype)
        return y if self.bias is None else y + self.bias


def _product_of_codes(
    x: Float[Tensor, "... in"], read: ActivationGrid, params: Params, q: Quantized
) -> Float32[Tensor, "... out"] | None:
    """int8 times int8 in int32, or floats of 8 bits where a device multiplies them, scaled afterwards, as engines have
    it. None where a row or a token has several scales, or numbers are of other kinds."""
    grid = q.grid
    if not isinstance(read, ScaledActivations) or isinstance(read.granularity, int):
        return None
    if not isinstance(grid, ScalarGrid) or not grid.scale or grid.group_size:
        return None
    if is_integer(grid) and grid.symmetric and read.number not in FLOATS:
        weight = (q.codes.to(torch.int16) - grid.midpoint).to(torch.int8)
        product = int8_product
    elif _are_float8(read.number, str(grid.levels)) and multiplies_float8(x.device):
        weight = q.codes.view(FLOATS[str(grid.levels)])
        product = float8_product
    else:
        return None
    sums = product(read.codes(x, params).flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    if "zero" in params:
        sums = sums - params["zero"] * weight.sum(1)
    return sums * params["scale"] * q.params["scale"].float().flatten()


def _are_float8(number: str, levels: str) -> bool:
    """Such as are multiplied by one another: no unit multiplies E5M2 by E5M2."""
    return {number, levels} <= FLOATS.keys() and "fp8-e4m3" in (number, levels)
