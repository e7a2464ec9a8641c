"""compressed-tensors (vllm-project/compressed-tensors): a format for each grid, and a config that says which modules are in which."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.compressed.layout import SCALE_NAMES, Layout
from halfbyte.containers.compressed.packed import Packed
from halfbyte.containers.compressed.small_floats import MXFP4, MXFP6, NV4
from halfbyte.containers.compressed.unpacked import MX8, Unpacked
from halfbyte.containers.container import Config, ConfigContainer, patterns
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.floats import FloatGrid
from halfbyte.grids.grid import Grid, Quantized, Shape
from halfbyte.grids.scalar import SCALE_DTYPES, IntGrid

LAYOUTS: dict[str, Layout] = {layout.format: layout for layout in (Packed(), Unpacked(), MX8(), MXFP4, MXFP6, NV4())}
SYNONYMS = {"float-quantized": "naive-quantized", "int-quantized": "naive-quantized"}
MIXED = "mixed-precision"
"""What the config calls several formats."""


class CompressedTensors(ConfigContainer):
    """Weights of any format, with 16-bit inputs."""

    name = "compressed-tensors"
    read_too = ("weight", "weight_zero_point", "input_scale", "input_zero_point", "input_global_scale")

    def native(self, grid: Grid, dtype: torch.dtype) -> Grid:
        layout_of(grid)
        return grid.with_scale(SCALE_NAMES[dtype]) if isinstance(grid, IntGrid | FloatGrid) and grid.scale in SCALE_DTYPES else grid

    def check(self, grid: Grid, shape: Shape) -> None:
        layout_of(grid).check(grid, shape)

    def same(self, q: Quantized) -> Quantized | None:
        return q

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        return layout_of(grid).plan(grid, shape)

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        return layout_of(q.grid).pack(q)

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        layout = layout_of(grid) if "weight_packed" in tensors or isinstance(grid, FloatGrid) else LAYOUTS["naive-quantized"]
        return layout.unpack(tensors, grid, shape)

    def config(self, grids: Mapping[str, Grid], kept: list[str], dtype: torch.dtype) -> Config:
        groups: dict[str, Config] = {}
        for grid in sorted(set(grids.values()), key=str):
            own = [name for name, g in grids.items() if g == grid]
            others = [name for name in grids if name not in set(own)]
            targets = [f"re:^{p}$" for p in patterns(own, others)] if others else ["Linear"]
            # The head is no Linear to vLLM and SGLang; they quantize it if a target names it (their pull requests 37291 and 35228).
            targets += [f"re:.*{re.escape(name)}$" for name in own if not any(part.isdigit() for part in name.split("."))]
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "weights": layout_of(grid).arguments(grid),
                "input_activations": None,
                "output_activations": None,
                "format": layout_of(grid).format,
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": sorted(kept),
        }

    def reads(self, config: Config) -> bool:
        return config.get("quant_method") == self.name

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Grid, Shape]]:
        groups = list(config.get("config_groups", {}).values())
        formats = {config.get("format"), *(group.get("format") for group in groups)}
        if unknown := sorted(f for f in formats - {None, MIXED, "dense"} if f not in LAYOUTS and f not in SYNONYMS):
            raise Unsupported(f"compressed-tensors format '{unknown[0]}' is not read yet; {', '.join([*LAYOUTS, *SYNONYMS])} are")
        said = [group["weights"] for group in groups if group.get("weights")]
        found: dict[str, tuple[Grid, Shape]] = {}
        for name in entries:
            module, _, suffix = name.rpartition(".")
            if suffix == "weight_packed" or (suffix == "weight" and f"{module}.weight_scale" in entries):
                read = (layout.find(entries, module, said) for layout in LAYOUTS.values())
                known = next((what for what in read if what), None)
                if known is None:
                    raise Unsupported(f"{name}: {entries[name].dtype} {tuple(entries[name].shape)} is of no format that is read: {', '.join(LAYOUTS)}")
                found[module] = known
        return found


def layout_of(grid: Grid) -> Layout:
    """Raises Unsupported for a grid that no format holds."""
    layout = next((layout for layout in LAYOUTS.values() if layout.writes(grid)), None)
    if layout is None:
        raise Unsupported(f"compressed-tensors has no format for {grid}; it has integers of 2 to 8 bits, fp8-e4m3, mxfp8-e4m3, mxfp6-e2m3, mxfp4, nvfp4-global")
    return layout
