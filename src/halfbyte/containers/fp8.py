"""FP8 as DeepSeek's checkpoints have it (deepseek-ai/DeepSeek-V3; vLLM model_executor/layers/quantization/fp8.py; Transformers
integrations/finegrained_fp8.py). The engine rounds inputs to FP8 too, with scales that it finds as it runs.

weight            float8 [out, in]
weight_scale_inv  fp32 [ceil(out / 128), ceil(in / 128)], what the block is multiplied by, despite its name
weight_scale      fp32 [], in its place where a whole matrix has one scale

Also read are powers of two in bytes: as scales of such blocks (scale_fmt ue8m0), and of 32 in-features (MXFP8).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.container import Config, ConfigContainer, commonest
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.floats import FLOAT_GRIDS, SIDE, FloatGrid
from halfbyte.grids.grid import Grid, Quantized, Shape

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ELEMENTS = {dtype: name for name, dtype in DTYPES.items()}
BYTES = (torch.uint8, torch.float8_e8m0fnu)


class FP8(ConfigContainer):
    """Blocks of 128 x 128, or whole matrices."""

    name = "fp8"
    mixes = False
    read_too = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")

    def native(self, grid: Grid, dtype: torch.dtype) -> Grid:
        return _held(grid).with_scale("fp32")

    def check(self, grid: Grid, shape: Shape) -> None:
        if _held(grid).span == "block" and (shape[0] % SIDE or shape[1] % SIDE):
            raise Unsupported(f"fp8 has blocks of {SIDE} x {SIDE}, which readers want {shape[0]} x {shape[1]} to be a multiple of; compressed-tensors has rows")

    def same(self, q: Quantized) -> Quantized | None:
        if not isinstance(q.grid, FloatGrid) or q.grid.span not in ("block", "tensor"):
            return None
        return Quantized(q.grid.with_scale("fp32"), q.codes, {"scale": q.params["scale"].float()})

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        grid = _float(grid)
        weight = Spec(shape, DTYPES[grid.element.name])
        if grid.span == "tensor":
            return {"weight": weight, "weight_scale": Spec((), torch.float32)}
        return {"weight": weight, "weight_scale_inv": Spec(grid.scales_shape(shape), torch.uint8 if grid.scale == "e8m0" else torch.float32)}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        grid, scale = _held(q.grid), q.params["scale"]
        weight = q.codes.view(DTYPES[grid.element.name])
        return {"weight": weight, "weight_scale": scale.reshape(())} if grid.span == "tensor" else {"weight": weight, "weight_scale_inv": scale}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        grid = _float(grid)
        scale = tensors["weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"]
        scale = scale.view(torch.uint8) if scale.dtype in BYTES else scale.float()
        if scale.dtype == torch.uint8 and grid.scale != "e8m0":
            scale = torch.exp2(scale.float() - 127)
        return Quantized(grid, tensors["weight"].view(torch.uint8), {"scale": scale.reshape(grid.scales_shape(shape))})

    def config(self, grids: Mapping[str, Grid], kept: list[str], dtype: torch.dtype) -> Config:
        grid = _held(commonest(grids))
        return {
            "quant_method": self.name,
            "fmt": grid.element.name,
            "activation_scheme": "dynamic",
            **({"weight_block_size": [SIDE, SIDE]} if grid.span == "block" else {}),
            "modules_to_not_convert": sorted(kept),
            "ignored_layers": sorted(kept),  # the same, for vLLM before it knew the other name
        }

    def reads(self, config: Config) -> bool:
        return config.get("quant_method") in (self.name, "mxfp8")

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Grid, Shape]]:
        found: dict[str, tuple[Grid, Shape]] = {}
        for name, weight in entries.items():
            if name.endswith(".weight") and weight.dtype in ELEMENTS:
                module = name.removesuffix(".weight")
                scale = entries.get(f"{module}.weight_scale_inv") or entries.get(f"{module}.weight_scale")
                if scale is None:
                    raise Unsupported(f"{name} is FP8 and has no weight_scale_inv or weight_scale beside it")
                found[module] = _grid(name, weight, scale), weight.shape
        return found


def _grid(name: str, weight: Entry, scale: Entry) -> FloatGrid:
    """From shapes: what the config says is true of most modules only."""
    element = ELEMENTS[weight.dtype]
    grids = [FLOAT_GRIDS[f"fp8-{element}-{span}"] for span in ("block", "tensor", "channel")]
    if scale.dtype in BYTES and weight.shape[-1] % 32 == 0:
        grids.append(FLOAT_GRIDS[f"mxfp8-{element}"])
    shape = scale.shape if len(scale.shape) == 2 else (1, 1)
    if len(weight.shape) != 2 or not (fits := [g for g in grids if g.scales_shape(weight.shape) == shape]):
        raise Unsupported(
            f"{name}: scales {tuple(scale.shape)} for weights {tuple(weight.shape)} are not read; of blocks of {SIDE} x {SIDE}, rows, matrices are"
        )
    return fits[0]


def _float(grid: Grid) -> FloatGrid:
    if not isinstance(grid, FloatGrid):
        raise Unsupported(f"fp8 holds 8-bit floats only, not {grid}")
    return grid


def _held(grid: Grid) -> FloatGrid:
    """What is written."""
    grid = _float(grid)
    if grid.element.name not in DTYPES or grid.span not in ("block", "tensor"):
        raise Unsupported(f"fp8 holds fp8-e4m3-block, fp8-e4m3-tensor and those of e5m2, not {grid}")
    return grid
