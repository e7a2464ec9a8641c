"""FP8 as DeepSeek's checkpoints have it (deepseek-ai/DeepSeek-V3; vLLM model_executor/layers/quantization/fp8.py;
Transformers integrations/finegrained_fp8.py). The engine rounds inputs to FP8 too, with scales that it finds as it
runs.

weight            float8 [out, in]
weight_scale_inv  fp32 [ceil(out / 128), ceil(in / 128)], what the block is multiplied by, despite its name
weight_scale      fp32 [], in its place where a whole matrix has one scale

Also read are powers of two in bytes: as scales of such blocks (scale_fmt ue8m0), and of 32 in-features (MXFP8); scales
of rows, in weight_scale [out, 1] (fbgemm_fp8); and fused experts, X [experts, out, in] with X_scale_inv or X [experts,
in, out] with X_scale [experts, 1, out].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.containers.container import (
    ONE,
    SCALES,
    Config,
    Container,
    Has,
    PartSpec,
    any_of,
    commonest,
    described,
    input_parts,
    input_specs,
    input_tensors,
    inputs_of,
)
from halfbyte.containers.fused import unfuse
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ACTIVATION_GRIDS, ActivationGrid, ActivationQuant
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.grids.scalar import SCALAR_GRIDS, ScalarGrid, is_float
from halfbyte.kernels.scales import SIDE, e8m0

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ELEMENTS = {dtype: name for name, dtype in DTYPES.items()}
BYTES = (torch.uint8, torch.float8_e8m0fnu)
READ: dict[int | str, ActivationGrid] = {
    name: ACTIVATION_GRIDS[read]
    for name, read in {
        "block": "fp8-e4m3-g128",
        "channel": "fp8-e4m3-token",
        "tensor": "fp8-e4m3-token",
        32: "mxfp8-e4m3",
    }.items()
}
"""What engines round inputs to, by what shares a scale of the weights."""
STATIC = ACTIVATION_GRIDS["fp8-e4m3-static"]


@dataclass(frozen=True)
class FP8(Container):
    """Blocks of 128 x 128, or whole matrices."""

    name = "fp8"
    mixes = False
    foreign_suffixes = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Scales in fp32, and activations rounded to FP8 as engines do for that granularity."""
        grid = _held(scheme).with_scale("fp32")
        return WeightActivation(grid, scheme.activations or READ[grid.granularity])

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported for other grids and activations, and for shapes that are no multiple of 128 x 128
        blocks."""
        grid = _held(scheme)
        if scheme.activations not in (READ[grid.granularity], STATIC if grid.granularity == "tensor" else None):
            raise Unsupported(
                f"fp8 with scales per {grid.granularity} reads {READ[grid.granularity]} inputs"
                f"{f' or {STATIC}' if grid.granularity == 'tensor' else ''}, not {scheme.activations}"
            )
        if grid.granularity == "block" and (shape[0] % SIDE or shape[1] % SIDE):
            raise Unsupported(
                f"fp8 has blocks of {SIDE} x {SIDE}, which readers want {shape[0]} x {shape[1]} to be a multiple of; "
                "compressed-tensors has rows"
            )

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """FP8 in blocks or per tensor, with activations as engines round them; None for others."""
        if not is_float(q.grid) or q.grid.granularity not in ("block", "tensor"):
            return None
        read = (
            q.activations
            if q.activations and q.activations.grid == STATIC
            else ActivationQuant(READ[q.grid.granularity], {})
        )
        return Quantized(q.grid.with_scale("fp32"), q.codes, {"scale": q.params["scale"].float()}, read)

    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """FP8 weights, and scales of blocks or of the tensor."""
        grid = _float(scheme)
        weight = Spec(shape, DTYPES[grid.levels.name])
        if grid.granularity == "tensor":
            return {"weight": weight, "weight_scale": Spec((), torch.float32), **input_specs(scheme.activations)}
        return {
            "weight": weight,
            "weight_scale_inv": Spec(grid.scales_shape(shape), torch.float32 if grid.scale else torch.uint8),
        }

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """Either name of the scales, in any of the shapes that `find` knows."""
        grid, (out, width) = _float(scheme), shape
        rows, columns = grid.scales_shape(shape)
        shapes = {"tensor": (*ONE, (1, 1)), "channel": ((out, 1), (out,), (1, out))}.get(
            str(grid.granularity), ((rows, columns), (rows, 1, columns, 1))
        )
        scale = any_of(shapes, (*SCALES, *BYTES), optional=True)
        renamed = {"input_scale": "activation_scale"} if has("activation_scale") else {}
        inputs = {renamed.get(suffix, suffix): part for suffix, part in input_parts(scheme.activations).items()}
        return {
            "weight": any_of(((out, width), (width, out)), ELEMENTS),
            "weight_scale": scale,
            "weight_scale_inv": scale,
            **inputs,
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Codes as FP8, scales in fp32."""
        grid, scale = _held(q.grid), q.params["scale"]
        weight = q.codes.view(DTYPES[grid.levels.name])
        if grid.granularity == "tensor":
            return {"weight": weight, "weight_scale": scale.reshape(()), **input_tensors(q.activations)}
        return {"weight": weight, "weight_scale_inv": scale}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """Of any version that is read: transposed experts, scales in powers of two, either name of the scales."""
        grid, weight = _float(scheme), tensors["weight"].view(torch.uint8)
        scale = tensors["weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"]
        if _is_transposed(weight.shape, scale.shape):
            weight = weight.T.contiguous()
        scale = scale.view(torch.uint8) if scale.dtype in BYTES else scale.float()
        if scale.dtype == torch.uint8 and grid.scale:
            scale = e8m0(scale).float()
        return Quantized(
            grid, weight, {"scale": scale.reshape(grid.scales_shape(shape))}, self.inputs(tensors, scheme.activations)
        )

    def inputs(self, tensors: Mapping[str, Tensor], grid: ActivationGrid | None) -> ActivationQuant | None:
        """The activations' stored scale, under the name that Transformers gives it too."""
        renamed = (
            {"input_scale": tensors["activation_scale"]} if "activation_scale" in tensors else {}
        )  # what Transformers calls it
        return inputs_of({**tensors, **renamed}, grid)

    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """DeepSeek's `quantization_config`, with the unquantized modules by both names that engines know."""
        scheme = commonest(schemes)
        grid = _held(scheme)
        return {
            "quant_method": self.name,
            "fmt": grid.levels.name,
            "activation_scheme": "static" if scheme.activations == STATIC else "dynamic",
            **({"weight_block_size": [SIDE, SIDE]} if grid.granularity == "block" else {}),
            "modules_to_not_convert": sorted(unquantized),
            "ignored_layers": sorted(unquantized),  # the same, for vLLM before it knew the other name
        }

    def reads(self, config: Config) -> bool:
        """Whether `quant_method` is fp8, mxfp8 or fbgemm_fp8."""
        return config.get("quant_method") in (self.name, "mxfp8", "fbgemm_fp8")

    def unfuse_experts(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Experts that Transformers fused, one by one."""
        return unfuse(
            entries,
            {
                "": "weight",
                "_scale_inv": "weight_scale_inv",
                "_scale": "weight_scale",
                "_activation_scale": "activation_scale",
            },
        )

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """Every module with FP8 weights, its granularity as the shape of the scales shows it."""
        modules: dict[str, tuple[Scheme, Shape]] = {}
        for name, weight in entries.items():
            module = name.removesuffix(".weight")
            scale = entries.get(f"{module}.weight_scale_inv") or entries.get(f"{module}.weight_scale")
            if module != name and scale and weight.dtype in (*SCALES, torch.float64):
                raise BadCheckpoint(
                    f"'{name}' is {described(weight)} and has scales beside it, which are for floats of 8 bits; "
                    "download it again"
                )
            if module != name and weight.dtype in ELEMENTS:
                if scale is None:
                    raise Unsupported(f"{name} is FP8 and has no weight_scale_inv or weight_scale beside it")
                shape = weight.shape[::-1] if _is_transposed(weight.shape, scale.shape) else weight.shape
                grid = _grid(
                    name, weight, scale, "weight_block_size" in config and f"{module}.weight_scale_inv" in entries
                )
                has_scale = f"{module}.input_scale" in entries or f"{module}.activation_scale" in entries
                is_static = config.get("activation_scheme") == "static" and has_scale
                modules[module] = WeightActivation(grid, STATIC if is_static else READ[grid.granularity]), shape
        return modules


def _grid(name: str, weight: Entry, scale: Entry, in_blocks: bool) -> ScalarGrid:
    """From shapes: what the config says is true of most modules only."""
    element = ELEMENTS[weight.dtype]
    granularities = (
        ("block",) if in_blocks else ("block", "tensor", "channel") if len(scale.shape) > 1 else ("tensor", "channel")
    )
    grids = [SCALAR_GRIDS[f"fp8-{element}-{granularity}"] for granularity in granularities]
    if scale.dtype in BYTES and weight.shape[-1] % 32 == 0:
        grids.append(SCALAR_GRIDS[f"mxfp8-{element}"])
    if _is_transposed(weight.shape, scale.shape) and not in_blocks:
        return SCALAR_GRIDS[f"fp8-{element}-channel"]
    shape = {0: (1, 1), 1: (*scale.shape, 1), 4: scale.shape[::2]}.get(
        len(scale.shape), scale.shape
    )  # [1], [out], [rows, 1, columns, 1]
    if len(weight.shape) != 2 or not (fits := [g for g in grids if g.scales_shape(weight.shape) == shape]):
        raise Unsupported(
            f"{name}: scales {tuple(scale.shape)} for weights {tuple(weight.shape)} are not read; of blocks of "
            f"{SIDE} x {SIDE}, rows, matrices are"
        )
    return fits[0]


def _is_transposed(weight: Shape, scale: Shape) -> bool:
    """Llama 4's experts lie as [in, out]; scales of rows, [1, out] or [out, 1], show it. Blocks have so many for narrow
    matrices only."""
    return len(weight) == 2 and weight[0] != weight[1] > SIDE and tuple(scale) in ((1, weight[1]), (weight[1], 1))


def _float(scheme: Scheme) -> ScalarGrid:
    grid = scheme.weight
    if not is_float(grid):
        raise Unsupported(f"fp8 holds 8-bit floats only, not {grid}")
    return grid


def _held(scheme: Scheme) -> ScalarGrid:
    """What is written."""
    grid = _float(scheme)
    if grid.levels.name not in DTYPES or grid.granularity not in ("block", "tensor"):
        raise Unsupported(f"fp8 holds fp8-e4m3-block, fp8-e4m3-tensor and those of e5m2, not {grid}")
    return grid
