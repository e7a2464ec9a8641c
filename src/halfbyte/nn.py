"""load(): any checkpoint that we can read, as a Transformers model that runs."""

from collections.abc import Callable, Iterable
from functools import wraps
from math import inf, prod
from pathlib import Path
from types import new_class
from typing import cast

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from halfbyte.devices import device_named, kind_of, multiplies_float8
from halfbyte.errors import UnknownName
from halfbyte.formats import MULTIPLIED, Activations
from halfbyte.grids.activations import FLOATS, ActivationGrid, ActivationQuant, ScaledActivations
from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import ROOM, PackedMatrix, Quantized
from halfbyte.grids.scalar import ScalarGrid, is_integer
from halfbyte.kernels.panels import Panels, product, worth_making
from halfbyte.kernels.products import float8_product, int8_product
from halfbyte.models import filling, kv, mapping, skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.matmuls import rounding
from halfbyte.models.precision import DTYPE_NAMES
from halfbyte.models.weight import Weight

SHARE = 0.6
"""Of the free memory, which decoded weights may take."""
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


class PanelLinear(PackedModule):
    """A linear that multiplies by a packed weight as it is."""

    bias: nn.Parameter | None

    def __init__(self, matrix: Panels, bias: Tensor | None, dtype: torch.dtype, activations: Activations = "exact"):
        super().__init__(matrix, dtype)
        self.activations: Activations = activations
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

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
        y = product(x.reshape(-1, width), self.matrix, self._parameters["bias"], self.activations)
        return y.view(*before, y.shape[1])


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


RESCALED = {"rwkv"}
"""Models whose code divides the weights of linears in place before they run."""


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    activations: Activations | None = None,
):
    """The model in `dtype`, on `device`. By default the checkpoint's own; a GGUF does not say what its model was
    computed in, and is loaded in bfloat16: hidden states of Gemma are beyond float16.

    Linears and embeddings that are quantized stay packed, on every device; fused experts, transposed matrices, linears
    whose class does more than multiply (routers) and what a model changes before it looks at it (embeddings with a
    `max_norm`, linears of RWKV) are decoded. A KV cache that is quantized holds the values that an engine would read
    from it, in 16 bits.

    Weights are decoded for each product, which is the reference; with `activations`, they are multiplied by as they are
    packed, on CPUs and on GPUs since Ampere that Triton has kernels for: by "exact" activations, or on CPUs by ones
    that are rounded to "int8" in groups of 32, as llama.cpp does, which is faster and loses a little.
    Raises HalfbyteError.
    """
    if activations is not None and activations not in MULTIPLIED:
        raise UnknownName("way to take activations", activations, MULTIPLIED)
    where = device_named(str(device))
    if isinstance(dtype, str) and dtype not in DTYPE_NAMES:
        raise UnknownName("dtype", dtype, DTYPE_NAMES)
    checkpoint = Checkpoint.open(path)
    model = built(checkpoint, (DTYPE_NAMES[dtype] if isinstance(dtype, str) else dtype), where)
    if activations:
        multiply_packed(model, activations)
    return model


def built(checkpoint: Checkpoint, dtype: torch.dtype | None, where: torch.device):
    """The same of a checkpoint that is open, with the adapter and the cache that it has."""
    dtype = dtype or checkpoint.unquantized_dtype
    model = skeleton.build(checkpoint, dtype)
    weight_map = mapping.places(model, checkpoint.tensors())
    ties = filling.ties(model, weight_map)
    names = filling.inside(model, "")
    filling.require_whole(model, checkpoint, weight_map, names)
    packed = _packed(model, checkpoint, weight_map)
    for tensor, home in packed.items():
        tied = (name.removesuffix(".weight") for name, source in ties.items() if source == f"{home}.weight")
        _replace(model, (home, *tied), checkpoint.read_packed(tensor.removesuffix(".weight")), dtype)
    filling.load(model, checkpoint, weight_map, ties, names, where)
    nn.Module.to(model, where)
    decoded = {
        w: inputs
        for w in checkpoint.weights()
        if f"{w.name}.weight" not in packed and w.tensor in weight_map and (inputs := checkpoint.read_inputs(w.name))
    }
    if decoded:
        _round_inputs(model, checkpoint, weight_map, decoded)
    if checkpoint.kv:
        kv.apply(model, weight_map, checkpoint.kv, where)
    return model


def _replace(model: nn.Module, names: Iterable[str], matrix: PackedMatrix, dtype: torch.dtype) -> None:
    """Modules that share a matrix: one for all linears of the same bias, and one for each embedding."""
    made: dict[int, nn.Module] = {}
    for name in names:
        before = model.get_submodule(name)
        if isinstance(before, nn.Linear):
            model.set_submodule(name, made.setdefault(id(before.bias), QuantLinear(matrix, before.bias, dtype)))
        elif isinstance(before, nn.Embedding) and not isinstance(before, QuantEmbedding):
            model.set_submodule(name, made.setdefault(id(before), QuantEmbedding.of(before, matrix, dtype)))


def multiply_packed(model: nn.Module, activations: Activations, room: float = ROOM) -> None:
    """Have linears multiply by packed weights as they are, where a kernel does that with panels of at most `room` times
    the bits of the file; embeddings that are tied to them look up the same panels."""
    sharing: dict[int, list[PackedModule]] = {}
    for module in model.modules():
        if isinstance(module, QuantEmbedding) or (isinstance(module, QuantLinear) and module.activations is None):
            sharing.setdefault(id(module.packed_0), []).append(module)
    made: dict[int, PanelLinear] = {}
    for modules in sharing.values():  # one matrix after another: of no other are there two forms at a time
        linears = [module for module in modules if isinstance(module, QuantLinear)]
        if not linears or not worth_making(linears[0].like):
            continue
        if panels := linears[0].matrix.quantized.panels(room):
            for module in modules:
                if isinstance(module, QuantLinear):
                    made[id(module)] = PanelLinear(panels, module.bias, module.dtype, activations)
                module.hold(panels)
    _exchange(model, lambda linear: made.get(id(linear), linear))


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


def loaded_sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each weight of a model that is loaded: as it lies in the file, or decoded where it does not stay so."""
    model, shapes = skeleton.build(checkpoint, dtype), checkpoint.tensors()
    packed = _packed(model, checkpoint, mapping.places(model, shapes))
    return {
        name: sum(checkpoint.entries[part].size_bytes for part in checkpoint.parts_of[name.removesuffix(".weight")])
        if name in packed
        else prod(shape) * dtype.itemsize
        for name, shape in shapes.items()
    }


def schemes(checkpoint: Checkpoint) -> dict[str, str]:
    """What modules of the model are stored as, those that are quantized."""
    model = skeleton.build(checkpoint, checkpoint.unquantized_dtype)
    weight_map = mapping.places(model, checkpoint.tensors())
    stored = {
        view.parameter: str(scheme)
        for module, (scheme, _) in checkpoint.quantized.items()
        if (view := weight_map.get(f"{module}.weight"))
    }
    tied = {name: stored[home] for name, home in filling.ties(model, weight_map).items() if home in stored}
    return {name.removesuffix(".weight"): scheme for name, scheme in (stored | tied).items()}


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The same of all of them together."""
    return sum(loaded_sizes(checkpoint, dtype).values())


def _packed(model: nn.Module, checkpoint: Checkpoint, weight_map: dict[str, mapping.ParamView]) -> dict[str, str]:
    """Tensors that stay packed, and the linears and embeddings that take them."""
    packed: dict[str, str] = {}
    for module in checkpoint.quantized if checkpoint.model_type not in RESCALED else ():
        view = weight_map.get(f"{module}.weight")
        if view and view.expert is None and not view.transposed:
            home = view.parameter.removesuffix(".weight")
            submodule, shape = model.get_submodule(home), checkpoint.quantized[module][1]
            looks_up = isinstance(submodule, nn.Embedding) and submodule.max_norm is None
            multiplies = isinstance(submodule, nn.Linear) and type(submodule).forward is nn.Linear.forward
            if (multiplies or looks_up) and submodule.weight.shape == shape:
                packed[f"{module}.weight"] = home
    return packed


def _round_inputs(
    model: nn.Module,
    checkpoint: Checkpoint,
    weight_map: dict[str, mapping.ParamView],
    inputs: dict[Weight, ActivationQuant],
) -> None:
    """Have the model round what matrices read that are no QuantLinear."""
    shapes = checkpoint.tensors()
    views = {
        w: weight_map[w.tensor].view(filling.tensor(model, weight_map[w.tensor].parameter), shapes[w.tensor])
        for w in inputs
    }
    forward = model.forward

    @wraps(forward)
    def rounded(*args, **kwargs):
        with rounding(views, inputs):
            return forward(*args, **kwargs)

    model.forward = rounded
