"""GGUF: rows of blocks, one ggml type for each tensor (ggml's docs/gguf.md), under ggml's names, in a file or parts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.containers import kv
from halfbyte.containers.container import weights_only
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.kv import KVGrid
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import is_integer
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.precision import DTYPE_NAMES
from halfbyte.models.weight import Weight
from halfbyte.recipe import PARTS, Method, Recipe
from halfbyte.targets.constraints import EACH, Rule, TiedGroup, tied_by
from halfbyte.targets.gguf import blocks, presets, types
from halfbyte.targets.gguf.blocks import TYPE_OF, type_of
from halfbyte.targets.gguf.file import ALIGNMENT
from halfbyte.targets.gguf.names import OTHERWISE
from halfbyte.targets.gguf.source import name_map_of
from halfbyte.targets.gguf.writer import GGUFWriter
from halfbyte.targets.plan import Plan
from halfbyte.targets.target import Target


@dataclass(frozen=True)
class GGUF(Target):
    """Any type of ggml that the installed gguf package decodes."""

    marks = ("*.gguf",)
    recipe_fields = frozenset({"pure", "pre"})
    default_grid = "Q4_K_M"
    library = "gguf"
    candidates = (
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    )
    alignment = ALIGNMENT
    has_presets = True

    @property
    def name(self) -> str:
        """gguf."""
        return blocks.NAME

    @property
    def title(self) -> str:
        """GGUF."""
        return "GGUF"

    def grid_name(self, scheme: Scheme) -> str:
        """ggml's name of the type."""
        return type_of(scheme.weight)

    def require_name(self, name: str, mixture: bool) -> None:
        """Raise UnknownName for a word that is no type, nor, where a mixture is wanted, a preset."""
        if not (mixture and presets.is_preset(name)):
            types.type_named(name)

    def means(self, name: str) -> str:
        """ggml's own grid where a type of the file is called as another grid is."""
        return OTHERWISE.get(name.upper(), name)

    def prefers(self, name: str, scheme: Scheme | None) -> bool:
        """Whether the name is a preset, or the grid a type that no folder of safetensors holds."""
        return presets.is_preset(name) or (scheme in TYPE_OF and not is_integer(scheme))

    def label(self, plan: Plan) -> str:
        """Its preset, or the commonest type."""
        named = [self.grid_name(scheme) for scheme in plan.schemes.values()]
        return plan.preset or (max(named, key=named.count) if named else plan.recipe.grid)

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Scales in fp16. Raises Unsupported for rounded activations, which llama.cpp chooses itself."""
        grid = weights_only(scheme, self.name)
        return grid.with_scale("fp16") if is_integer(grid) else grid

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported unless a type of ggml holds such a matrix."""
        blocks.check(scheme, shape)

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """The matrix on a type of ggml, value for value; None where it must be rounded."""
        return blocks.cast_exact(q)

    def casts(self, q: Quantized) -> Iterator[Quantized]:
        """Exact casts, then Q4_1 and Q5_1 with a rounded minimum."""
        yield from super().casts(q)
        if near := blocks.with_minimum(q):
            yield near

    def specs(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """One tensor of bytes, whose suffix is empty."""
        return {"": blocks.spec(weights_only(scheme, self.name), shape)}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """The bytes of its blocks."""
        return {"": blocks.pack(q)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """The inverse of `pack`."""
        return blocks.unpack(tensors[""], weights_only(scheme, self.name))

    def ties(self, checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[TiedGroup]:
        """Experts of a block are one tensor, however they lie in the source."""
        names = name_map_of(checkpoint)

        def stack(weight: Weight) -> str | None:
            expert = next(
                (p for p in names.mapped(weight.tensor) if weight.expert is not None or p.expert is not None), None
            )
            return expert.name if expert else None

        return tied_by(
            weights, stack, Rule.SAME, f"'{{key}}' holds all experts of a block, so they need one type, not {EACH}"
        )

    def plan(self, recipe: Recipe, checkpoint: Checkpoint, method: Method) -> Plan:
        """A type for every tensor, by a preset's rules or as asked."""
        return types.quantizing(self, recipe, checkpoint, method)

    def convert(self, recipe: Recipe, checkpoint: Checkpoint, grid: str | None) -> Plan:
        """A type that holds each matrix as it is, or one to round it to."""
        return types.converting(self, recipe, checkpoint, grid)

    def decode(self, recipe: Recipe, checkpoint: Checkpoint) -> Plan:
        """Every tensor in F32, F16 or BF16."""
        plain = recipe.model_copy(update={"grid": presets.PLAIN_NAMES[DTYPE_NAMES[recipe.grid]]})
        plan = types.quantizing(self, plain, checkpoint, PARTS["nearest"])
        return replace(plan, recipe=recipe, unquantized_dtype=torch.float32)  # the writer rounds what it is given, once

    def require_cache(self, grid: KVGrid) -> None:
        """Raises Unsupported: llama.cpp chooses its KV cache as it starts."""
        raise Unsupported(f"a GGUF stores nothing of a KV cache: llama.cpp chooses it as it starts, {kv.LLAMA_CPP}")

    def writer(self, plan: Plan) -> GGUFWriter:
        """Writes one file, or parts of one."""
        return GGUFWriter(plan)
