"""bitsandbytes, as Transformers saves it (bitsandbytes nn/modules.py, functional.py QuantState.as_dict; transformers
integrations/bitsandbytes.py).

4 bits, row after row, the first of two weights in the high half of a byte:

    weight                                uint8 [weights / 2, 1]
    weight.absmax                         fp32  [blocks]; uint8 where scales are quantized too, and then there are
    weight.nested_absmax                  fp32  [blocks / 256]
    weight.nested_quant_map               fp32  [256], their levels
    weight.quant_map                      fp32  [16], the levels of weights
    weight.quant_state.bitsandbytes__nf4  JSON in bytes: type, block, shape, dtype to decode to, offset of the scales

8 bits, LLM.int8():

    weight         int8 [out, in]
    SCB            fp32 [out], what 127 stands for
    weight_format  uint8, 0 for rows
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor

from halfbyte.containers.container import Config, Container, Has, PartSpec, commonest, stored
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.files import parse_json
from halfbyte.grids.activations import ActivationQuant, LLMInt8Activations
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.grids.scalar import LLM_INT8 as LLM_INT8_GRID
from halfbyte.grids.scalar import TABLES, ScalarGrid, integers, is_absmax, is_integer, parse
from halfbyte.kernels.levels import values_of
from halfbyte.kernels.scales import NESTED, dynamic_map

STATE = "weight.quant_state.bitsandbytes__"
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
LLM_INT8 = WeightActivation(LLM_INT8_GRID, LLMInt8Activations())
"""Whoever multiplies by these weights rounds what they read, too."""
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
"""What bytes of codes are called (bnb_4bit_quant_storage)."""
LONGEST_STATE = 4096
ZERO = 128
"""The code of zero of LLM.int8()."""
ROOM = 32
"""Bytes for the dtype and the offset, whose lengths no shape tells: blanks fill what is left, and JSON does not
mind."""


@dataclass(frozen=True)
class BitsAndBytes(Container):
    """NF4, FP4 and LLM.int8()."""

    name = "bitsandbytes"
    mixes = False
    dtype: torch.dtype = torch.bfloat16
    """What engines decode to, which every matrix notes."""

    def for_model(self, dtype: torch.dtype) -> "BitsAndBytes":
        """The same, with the dtype that engines decode to."""
        return BitsAndBytes(dtype)

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """int8 per channel becomes LLM.int8(), which rounds activations too; other schemes stay."""
        grid = scheme.weight
        is_int8 = _is_llm_int8(grid) or (is_integer(grid) and grid.with_scale("fp16") == integers(8, "channel"))
        return LLM_INT8 if is_int8 and scheme.activations in (None, LLM_INT8.activations) else scheme

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported for grids but NF4, FP4 and LLM.int8(), and for shapes that blocks do not suit."""
        grid = _held(scheme)
        if is_absmax(grid):
            grid.require_fit(shape)

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """NF4, FP4 and LLM.int8() as they are; None for others."""
        if _is_llm_int8(q.grid):
            return q._replace(activations=ActivationQuant(LLM_INT8.activations, {}))
        return q if is_absmax(q.grid) and not q.activations else None

    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Codes, scales, tables of levels, and room for the quantization state in JSON."""
        grid, (out, width) = _held(scheme), shape
        if _is_llm_int8(grid):
            return {
                "weight": Spec((out, width), torch.int8),
                "SCB": Spec((out,), torch.float32),
                "weight_format": Spec((), torch.uint8),
            }
        blocks = prod(grid.scales_shape(shape))
        specs = {
            "weight": Spec((-(-out * width // 2), 1), torch.uint8),
            "weight.absmax": Spec((blocks,), torch.uint8 if grid.nested else torch.float32),
            "weight.quant_map": Spec((16,), torch.float32),
            STATE + grid.levels.name: Spec((len(_state(grid, shape, "", None)) + ROOM,), torch.uint8),
        }
        if grid.nested:
            specs["weight.nested_absmax"] = Spec((-(-blocks // NESTED),), torch.float32)
            specs["weight.nested_quant_map"] = Spec((256,), torch.float32)
        return specs

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """As `plan`; 4-bit codes may be called by any of the dtypes in STORAGE."""
        grid, plan = _held(scheme), self.plan(scheme, shape)
        parts = {
            suffix: PartSpec((spec,), optional=suffix == "weight_format")
            for suffix, spec in plan.items()
            if not suffix.startswith(STATE)
        }
        if _is_llm_int8(grid):
            return parts
        size_bytes = plan["weight"].size_bytes
        return {
            **parts,
            "weight": PartSpec(
                tuple(
                    Spec((size_bytes // dtype.itemsize, 1), dtype)
                    for dtype in STORAGE
                    if size_bytes % dtype.itemsize == 0
                )
            ),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Two codes to a byte, with their levels, scales and state; or signed bytes, for LLM.int8()."""
        grid, params = _held(q.scheme), q.params
        if _is_llm_int8(grid):
            weight = (q.codes.int() - ZERO).to(torch.int8)
            return {
                "weight": weight,
                "SCB": params["scale"].flatten(),
                "weight_format": torch.zeros((), dtype=torch.uint8),
            }
        offset = params["offset"].item() if grid.nested else None
        state = _state(grid, q.shape, DTYPES[self.dtype], offset)
        length = self.plan(q.scheme, q.shape)[STATE + grid.levels.name].shape[0]
        pairs = torch.nn.functional.pad(q.codes.flatten(), (0, q.codes.numel() % 2)).view(-1, 2)
        tensors = {
            "weight": pairs[:, :1] << 4 | pairs[:, 1:],
            "weight.absmax": params["scale"].flatten(),
            "weight.quant_map": _levels_of(grid),
            STATE + grid.levels.name: torch.frombuffer(bytearray(state.ljust(length)), dtype=torch.uint8),
        }
        if grid.nested:
            tensors["weight.nested_absmax"] = params["nested"]
            tensors["weight.nested_quant_map"] = dynamic_map()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """The inverse. Raises Unsupported for levels that are not bitsandbytes' own."""
        grid, (out, width) = _held(scheme), shape
        if _is_llm_int8(grid):
            if tensors.get("weight_format", torch.zeros(1)).any():
                raise Unsupported(
                    "LLM.int8() weights in the order of an old GPU (weight_format) are not read; load them with "
                    "bitsandbytes and save them again"
                )
            return Quantized(
                grid,
                (tensors["weight"].int() + ZERO).to(torch.uint8),
                {"scale": tensors["SCB"].reshape(-1, 1)},
                ActivationQuant(LLM_INT8.activations, {}),
            )
        _require_same("quant_map", tensors["weight.quant_map"], _levels_of(grid))
        raw = tensors["weight"].contiguous().flatten().view(torch.uint8)
        codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: out * width].view(out, width)
        params = {"scale": tensors["weight.absmax"].view(grid.scales_shape(shape))}
        if grid.nested:
            _require_same("nested_quant_map", tensors["weight.nested_quant_map"], dynamic_map())
            offset = _parsed(tensors[STATE + grid.levels.name])["nested_offset"]
            nested = tensors["weight.nested_absmax"]
            params |= {"nested": nested, "offset": nested.new_tensor([offset], dtype=torch.float32)}
        return Quantized(grid, codes, params)

    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """Transformers' BitsAndBytesConfig, with the unquantized modules by name."""
        grid = _held(commonest(schemes))
        four = is_absmax(grid)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": grid.levels.name if four else "fp4",
            "bnb_4bit_use_double_quant": four and grid.nested,
            "bnb_4bit_compute_dtype": DTYPES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(unquantized),
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }

    def reads(self, config: Config) -> bool:
        """Whether it is a BitsAndBytesConfig that loads 4 or 8 bits."""
        # Older versions of Transformers did not write the method.
        return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(
            config.get("load_in_4bit") or config.get("load_in_8bit")
        )

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """4-bit modules by their quantization state, 8-bit ones by their SCB."""
        modules: dict[str, tuple[Scheme, Shape]] = {}
        for name in entries:
            module, _, kind = name.rpartition(f".{STATE}")
            if module:
                state = _quant_state(name, entries)
                grid = _grid_named(f"{kind}-g{state['blocksize']}{'-double' if 'nested_blocksize' in state else ''}")
                if grid.nested and state["nested_blocksize"] != NESTED:
                    raise Unsupported(
                        f"{module}: scales that share a scale by {state['nested_blocksize']} are not read; by "
                        f"{NESTED} they are"
                    )
                modules[module] = (grid, tuple(state["shape"]))
                grid.require_fit(modules[module][1])
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                modules[module] = (LLM_INT8, stored(entries, f"{module}.weight", [torch.int8]).shape)
        return modules


def _is_llm_int8(grid: Grid) -> TypeGuard[ScalarGrid]:
    """Whether weights are those of LLM.int8()."""
    return grid == LLM_INT8_GRID


def _levels_of(grid: ScalarGrid) -> Tensor:
    """What codes stand for, from -1 to 1."""
    return values_of(TABLES[grid.levels.name]) * grid.levels.unit


def _grid_named(name: str) -> ScalarGrid:
    grid = parse(name)
    if grid is None:
        raise BadCheckpoint(f"a matrix is said to be {name}, which is no grid of bitsandbytes")
    return grid


def _held(scheme: Scheme) -> ScalarGrid:
    grid = scheme.weight
    if not (is_absmax(grid) or _is_llm_int8(grid)) or scheme.activations not in (None, LLM_INT8.activations):
        kinds = " and ".join(TABLES)
        raise Unsupported(
            f"bitsandbytes holds {kinds} in blocks (such as nf4-g64 or nf4-g64-double) and int8-channel, not {scheme}"
        )
    return grid


def _state(grid: ScalarGrid, shape: Shape, dtype: str, offset: float | None) -> bytes:
    """What bitsandbytes notes beside the tensors of a matrix."""
    state = {"quant_type": grid.levels.name, "blocksize": grid.granularity, "dtype": dtype, "shape": list(shape)}
    if grid.nested:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _quant_state(name: str, entries: Mapping[str, Entry]) -> Config:
    """What is noted of a matrix. Raises BadCheckpoint for what bitsandbytes would not note."""
    entry = stored(entries, name, [torch.uint8], 1)
    state = _parsed(entry.read()) if entry.size_bytes <= LONGEST_STATE else {}
    shape = state.get("shape")
    is_shape = (
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    )
    is_double = "nested_blocksize" in state
    if (
        not is_shape
        or type(state.get("blocksize")) is not int
        or "dtype" not in state
        or (is_double and type(state.get("nested_offset")) is not float)
    ):
        raise BadCheckpoint(f"'{name}' does not say what block, shape and dtype a matrix has; download it again")
    return state


def _parsed(state: Tensor) -> Config:
    """Nothing of what is no JSON object."""
    try:
        parsed = parse_json(state.cpu().numpy().tobytes())
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _require_same(name: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.cpu().float(), expected):
        raise Unsupported(
            f"a {name} that is not bitsandbytes' own is not read; engines with kernels for 4 bits would not "
            "read it either"
        )
