"""What a token costs a model: bytes that are read of it, operations."""

from dataclasses import dataclass
from math import prod
from statistics import median

from halfbyte import nn
from halfbyte.errors import Unsupported
from halfbyte.inference.timing.load import Load, Seconds
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.inspect import stored
from halfbyte.report.types import Pace, Products, Spread
from halfbyte.sizing.cache import CacheType, LayerCache, ModelConfig, cache_bytes, layers_of
from halfbyte.sizing.memory import Weights, parameters_of, weights_of

CACHE = CacheType("16 bits", 16, 0, "what engines keep keys and values in, where nobody says otherwise")


@dataclass(frozen=True)
class Costs:
    """Of a model as an engine has it in memory."""

    size_bytes: int
    """In the file."""
    weights: Weights
    """Bytes."""
    head_bytes: int
    parameters: Weights
    head_parameters: int
    layers: tuple[LayerCache, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, in_memory: bool, products: list[Products]) -> "Costs":
        """`in_memory`: as halfbyte loads it, which multiplies by `products`; else as it lies in the file."""
        settings, in_file = ModelConfig(checkpoint.config), {row.name: row.size_bytes for row in stored(checkpoint)}
        sizes = _as_loaded(checkpoint, products) if in_memory else in_file
        shapes = checkpoint.tensors()
        heads = [name for name in shapes if roles.is_head(name) or (checkpoint.tied and roles.EMBEDDING.match(name))]
        try:
            layers = layers_of(checkpoint.config)
        except Unsupported:
            layers = ()  # of a kind that nobody has described: what is read of it is not counted
        return cls(
            sum(in_file.values()),
            weights_of(sizes, checkpoint, settings),
            sum(sizes.get(name, 0) for name in heads),
            parameters_of(checkpoint, settings),
            sum(prod(shapes[name]) for name in heads),
            layers,
        )

    def decode_bytes(self, load: Load) -> float:
        """That a step reads in which each sequence gets a token."""
        return self.weights.read(load.batch) + cache_bytes(self.layers, load.context, load.batch, CACHE)

    @property
    def prefill_operations(self) -> float:
        """Of a token of a prompt: the head predicts after the last one alone."""
        return 2 * (self.parameters.of_token - self.head_parameters)

    @property
    def decode_operations(self) -> float:
        """Of a token of an answer."""
        return 2 * self.parameters.of_token


def _as_loaded(checkpoint: Checkpoint, products: list[Products]) -> dict[str, int]:
    dtype = checkpoint.unquantized_dtype
    held = {row.grid for row in products if row.way == "held"}
    decoded = {
        f"{module}.weight": prod(shape) * dtype.itemsize
        for module, (scheme, shape) in checkpoint.quantized.items()
        if str(scheme) in held
    }
    return nn.loaded_sizes(checkpoint, dtype) | decoded


def spread(values: list[float]) -> Spread:
    """Of repeats."""
    return Spread(median=median(values), low=min(values), high=max(values))


def pace(load: Load, seconds: list[Seconds], costs: Costs, bandwidth: float, arithmetic: float) -> Pace:
    """What repeats of a load come to, beside what the machine can do."""
    read, answered = load.batch * load.prompt, load.batch * load.tokens
    prefill, decode = spread([read / s.first for s in seconds]), spread([answered / s.decode for s in seconds])
    return Pace(
        batch=load.batch,
        prompt=load.prompt,
        prefill=prefill,
        first_token=spread([s.first for s in seconds]),
        decode=decode,
        prefill_share=prefill.median * costs.prefill_operations / arithmetic,
        decode_share=decode.median / load.batch * costs.decode_bytes(load) / bandwidth,
        decode_arithmetic_share=decode.median * costs.decode_operations / arithmetic,
    )
