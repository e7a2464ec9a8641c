"""compressed-tensors (vllm-project/compressed-tensors): a format for each grid, and a config that says which modules
are in which."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from halfbyte.containers.compressed.inputs import check_inputs, group_of, input_arguments, input_grid
from halfbyte.containers.compressed.layout import SCALE_NAMES, Layout
from halfbyte.containers.compressed.packed import Packed
from halfbyte.containers.compressed.small_floats import MXFP4, MXFP6, NV4
from halfbyte.containers.compressed.unpacked import FLOAT, INT, MX8, NAIVE
from halfbyte.containers.container import (
    Config,
    Container,
    Has,
    PartSpec,
    any_of,
    input_parts,
    input_specs,
    input_tensors,
    inputs_of,
    patterns,
)
from halfbyte.containers.order import as_ordered
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported, brief
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.grids.scalar import NVFP4, NVFP4_FACTOR, ScalarGrid, is_integer

PACKED = Packed()
LAYOUTS: dict[str, Layout] = {
    layout.format: layout for layout in (PACKED, NAIVE, FLOAT, INT, MX8(), MXFP4, MXFP6, NV4())
}
ORDER = "weight_g_idx"
"""The group of each in-feature, in files of versions that sorted them (before 0.20)."""
MIXED = "mixed-precision"
"""What the config calls several formats."""
BLOCK = re.compile(r"[^.]+\.\d+\.")
"""The name of a list of blocks, and the number of one."""
GROUP: dict[str, tuple[type, ...]] = {
    "targets": (list,),
    "weights": (dict,),
    "input_activations": (dict,),
    "format": (str,),
}
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "num_bits": (int,),
    "group_size": (int,),
    "type": (str,),
    "strategy": (str,),
    "symmetric": (bool,),
    "dynamic": (bool, str),
}
"""Types of what is used of a group, and of its QuantizationArgs."""


@dataclass(frozen=True)
class CompressedTensors(Container):
    """Weights of any format, and inputs rounded in any way that the config has words for."""

    name = "compressed-tensors"
    foreign_suffixes = ("weight", "weight_zero_point", ORDER, "input_scale", "input_zero_point", "input_global_scale")

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Scales in the model's dtype. Raises Unsupported for a scheme that no format holds."""
        grid = NVFP4 if scheme.weight == NVFP4_FACTOR else scheme.weight
        grid = grid.with_scale(SCALE_NAMES[dtype]) if isinstance(grid, ScalarGrid) and grid.scale else grid
        resolved = WeightActivation(grid, scheme.activations) if scheme.activations else grid
        layout_of(resolved)
        return resolved

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported for activations or shapes that the scheme's format does not hold."""
        check_inputs(scheme.activations)
        layout_of(scheme).check(scheme.weight, shape)

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """The matrix itself: `resolve` and `check` say whether a format holds it."""
        return q

    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Tensors of the format of the scheme, and what is stored of activations."""
        scheme = _unordered(scheme)
        return {**layout_of(scheme).plan(scheme.weight, shape), **input_specs(scheme.activations)}

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """Those of the format in which the file has them, which may be another than is written here."""
        scheme = _unordered(scheme)
        return {
            **_layout_in_file(scheme, has("weight_packed")).parts(scheme.weight, shape),
            ORDER: any_of([(shape[1],)], [torch.int32], optional=True),
            **input_parts(scheme.activations),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """As the format of the scheme lays it out."""
        return {**layout_of(q.scheme).pack(q), **input_tensors(q.activations)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """As the format in the file lays it out."""
        plain, inputs = _unordered(scheme), inputs_of(tensors, scheme.activations)
        q = _layout_in_file(plain, "weight_packed" in tensors).unpack(tensors, plain.weight, shape)
        if plain != scheme:
            q = q._replace(grid=scheme.weight, params={**q.params, "g_idx": tensors[ORDER][None]})
        return q._replace(activations=inputs)

    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """A group for each scheme, with the modules that it targets; unquantized ones are ignored by name."""
        groups: dict[str, Config] = {}
        home = _wrapped_in(schemes)
        start = r"(.*\.)?" if home else "^"
        for scheme in sorted(set(schemes.values()), key=str):
            members = [name for name, s in schemes.items() if s == scheme]
            others = [name for name in schemes if name not in set(members)]
            inside = ([n.removeprefix(home) for n in names] for names in (members, others))
            targets = [f"re:{start}{p}$" for p in patterns(*inside)] if others else ["Linear"]
            # The head is no Linear to vLLM and SGLang; they quantize it if a target names it (their pull requests 37291
            # and 35228).
            targets += [
                f"re:.*{re.escape(name)}$" for name in members if not any(part.isdigit() for part in name.split("."))
            ]
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "weights": layout_of(scheme).arguments(scheme.weight),
                "input_activations": input_arguments(scheme.activations),
                "output_activations": None,
                "format": layout_of(scheme).format,
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": sorted(_ignored(unquantized, schemes)),
        }

    def reads(self, config: Config) -> bool:
        """Whether `quant_method` is compressed-tensors."""
        return config.get("quant_method") == self.name

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """Grid and shape of every module as its tensors show them, and how the config has its activations."""
        groups = _groups(config)
        formats = {config.get("format"), *(group.get("format") for group in groups.values())}
        if unknown := sorted(f for f in formats if f and f not in (MIXED, "dense", *LAYOUTS)):
            raise Unsupported(f"compressed-tensors format '{unknown[0]}' is not read yet; {', '.join(LAYOUTS)} are")
        weight_args = [group["weights"] for group in groups.values() if group.get("weights")]
        modules: dict[str, tuple[Scheme, Shape]] = {}
        for name in entries:
            module, _, suffix = name.rpartition(".")
            if suffix == "weight_packed" or (suffix == "weight" and f"{module}.weight_scale" in entries):
                read = (layout.find(entries, module, weight_args) for layout in LAYOUTS.values())
                grid_and_shape = next((what for what in read if what), None)
                if grid_and_shape is None:
                    raise Unsupported(
                        f"{name}: {entries[name].dtype} {tuple(entries[name].shape)} is of no format that is read: "
                        f"{', '.join(LAYOUTS)}"
                    )
                grid, shape = _in_order(f"{module}.{ORDER}", entries, *grid_and_shape)
                read = input_grid(group_of(module, groups).get("input_activations"))
                modules[module] = (WeightActivation(grid, read) if read else grid, shape)
        return modules


def _wrapped_in(modules: Iterable[str]) -> str:
    """Where the blocks of a decoder lie that is a part of a model: beside encoders of images vLLM has it elsewhere than
    the file, so targets leave that open. Empty for a decoder by itself, and where blocks lie in several places."""
    places = {name[: match.start()] for name in modules if (match := BLOCK.search(name))}
    return places.pop() if len(places) == 1 and "." in min(places).rstrip(".") else ""


def _ignored(unquantized: list[str], quantized: Iterable[str]) -> list[str]:
    """Names of modules, as patterns where they are in the name of a quantized one: SGLang looked for names in others
    (before its pull request 32736), and loaded what it found so in 16 bits."""
    names = "\n".join(quantized)
    return [f"re:^{re.escape(name)}$" if name in names else name for name in unquantized]


def _groups(config: Config) -> dict[str, Config]:
    """The config's groups of modules, of which every entry that is used is of the type that it should be."""
    _require_types(config, {"format": (str,), "config_groups": (dict,)})
    groups = config.get("config_groups") or {}
    for group in groups.values():
        _require_types(group, GROUP)
        for part in ("weights", "input_activations"):
            _require_types(group.get(part) or {}, ARGUMENTS)
        for target in group.get("targets") or []:
            _require_types({"targets": target}, {"targets": (str,)})
    return groups


def _require_types(section: object, types: Mapping[str, tuple[type, ...]]) -> None:
    """Raise BadCheckpoint for entries of other types; what is null is not there."""
    if not isinstance(section, dict):
        raise BadCheckpoint(f"config.json says of quantized weights what nobody would: {brief(section)}")
    for name, kinds in types.items():
        if section.get(name) is not None and type(section[name]) not in kinds:
            raise BadCheckpoint(
                f"config.json says of quantized weights what nobody would: {name} {brief(section[name])}"
            )


def _in_order(name: str, entries: Mapping[str, Entry], grid: Grid, shape: Shape) -> tuple[Grid, Shape]:
    """What a module is, its in-features in the order that the file has. -1 is an order that its writer never set."""
    entry = entries.get(name)
    if entry is not None and entry.dtype == torch.int32 and bool((entry.read() == -1).any()):
        entry = None
    return as_ordered(name, entry, grid, shape[1]), shape


def _unordered(scheme: Scheme) -> Scheme:
    """What the codes are, in whichever order the columns are grouped."""
    if not isinstance(scheme.weight, ActOrderGrid):
        return scheme
    return (
        WeightActivation(scheme.weight.integers, scheme.activations) if scheme.activations else scheme.weight.integers
    )


def _layout_in_file(scheme: Scheme, is_packed: bool) -> Layout:
    """Others give weights alone the names of those with inputs, and the other way round."""
    if is_integer(scheme.weight):
        return PACKED if is_packed else INT
    return layout_of(scheme)


@cache
def layout_of(scheme: Scheme) -> Layout:
    """Raises Unsupported for a scheme that no format holds."""
    layout = next((layout for layout in LAYOUTS.values() if layout.writes(scheme)), None)
    if layout is None:
        raise Unsupported(
            f"compressed-tensors has no format for {scheme}; it has integers of 2 to 8 bits, fp8-e4m3, mxfp8-e4m3, "
            "mxfp6-e2m3, mxfp4, nvfp4"
        )
    return layout
