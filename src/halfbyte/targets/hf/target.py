"""A folder of safetensors as on the Hugging Face hub, whose config.json says how its weights are quantized."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.containers import kv as layout
from halfbyte.containers.container import Container
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.cast import with_divisor
from halfbyte.grids.grid import Shape
from halfbyte.grids.kv import KVGrid
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.precision import DTYPE_NAMES
from halfbyte.recipe import Recipe
from halfbyte.targets.choosing import ROUNDING
from halfbyte.targets.hf.writer import FolderWriter
from halfbyte.targets.plan import Plan
from halfbyte.targets.target import Target


@dataclass(frozen=True)
class HuggingFace(Target):
    """Bits as a container lays them, in files that Transformers and the engines find by config.json."""

    marks = ("config.json",)
    candidates = (
        *("int2-g64", "int3-g128", "int3-g64", "int4-g128", "int4-g64", "int4-g32", "int5-g128", "int6-g128"),
        *("int8-g128", "int8-channel", "fp8-e4m3-channel", "nvfp4", "mxfp4"),
    )
    container: Container | None = None
    """None: in 16 or 32 bits, nothing is quantized."""

    @property
    def name(self) -> str:
        """The container's name; safetensors, where nothing is quantized."""
        return self.container.name if self.container else "safetensors"

    @property
    def mixes(self) -> bool:
        """Whether the container may hold several grids."""
        return self.container is None or self.container.mixes

    @property
    def _quantized(self) -> Container:
        if self.container is None:
            raise Unsupported("plain safetensors hold no quantized matrix; compressed-tensors does")
        return self.container

    def for_model(self, dtype: torch.dtype) -> "HuggingFace":
        """With the container's version for that dtype."""
        return replace(self, container=self._quantized.for_model(dtype))

    def for_tensor(self, q: Quantized) -> "HuggingFace":
        """With the container's version that holds such a matrix too."""
        return replace(self, container=self._quantized.for_tensor(q))

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """As the container resolves it."""
        return self._quantized.resolve(scheme, dtype)

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """As the container checks it."""
        self._quantized.check(scheme, shape)

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """As the container casts it."""
        return self._quantized.cast_exact(q)

    def casts(self, q: Quantized) -> Iterator[Quantized]:
        """Exact casts, then NVFP4 with a divisor in place of a factor."""
        yield from super().casts(q)
        if near := with_divisor(q):
            yield near

    def specs(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """As the container plans it."""
        return self._quantized.plan(scheme, shape)

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """As the container packs it."""
        return self._quantized.pack(q)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """As the container unpacks it."""
        return self._quantized.unpack(tensors, scheme, shape)

    def decode(self, recipe: Recipe, checkpoint: Checkpoint) -> Plan:
        """Every tensor in one dtype. Raises Unsupported for experts that Transformers would not find."""
        _require_names(checkpoint)
        unquantized = dict.fromkeys(checkpoint.tensors(), "decoded" if checkpoint.container else "as in the source")
        return Plan(recipe, checkpoint, self, ROUNDING, (), unquantized, unquantized_dtype=DTYPE_NAMES[recipe.grid])

    def require_cache(self, grid: KVGrid) -> None:
        """Raise Unsupported unless scales of such a KV cache are read beside this container."""
        layout.config({"quant_method": self.name}, grid)

    def writer(self, plan: Plan) -> FolderWriter:
        """Writes a folder."""
        return FolderWriter(plan, self.container)


def _require_names(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for experts that lie apart, where Transformers looks for stacks and would take random ones."""
    numbered = [m for m in checkpoint.quantized if re.search(r"\.\d+\.[^.]+$", m) and "expert" in m]
    if not numbered:
        return
    from halfbyte.models import modules, skeleton  # Transformers takes seconds to import

    try:
        model = skeleton.outline(checkpoint)
    except BadCheckpoint:
        return
    if lost := modules.read_in_stacks(model, numbered):
        raise Unsupported(
            f"in 16 bits Transformers reads '{lost}' out of one tensor of all experts, which is not put together yet; "
            "take the original model"
        )
