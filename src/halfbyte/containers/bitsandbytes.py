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

import torch
from torch import Tensor

from halfbyte.containers.container import Config, Container, Has, Part, commonest, stored
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.files import parse_json
from halfbyte.grids.absmax import LEVELS, NESTED, AbsmaxGrid, dynamic_map, levels
from halfbyte.grids.activations import ActivationQuant, LLMInt8Activations
from halfbyte.grids.grid import Shape
from halfbyte.grids.llm_int8 import ZERO, LLMInt8
from halfbyte.grids.quantized import AnyScheme, Quantized, Scheme
from halfbyte.grids.scalar import IntGrid

STATE = "weight.quant_state.bitsandbytes__"
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
LLM_INT8 = Scheme(LLMInt8(), LLMInt8Activations())
"""Whoever multiplies by these weights rounds what they read, too."""
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
"""What bytes of codes are called (bnb_4bit_quant_storage)."""
LONGEST_STATE = 4096
ROOM = 32
"""Bytes for the dtype and the offset, whose lengths no shape tells: blanks fill what is left, and JSON does not mind."""


@dataclass(frozen=True)
class BitsAndBytes(Container):
    """NF4, FP4 and LLM.int8()."""

    name = "bitsandbytes"
    mixes = False
    dtype: torch.dtype = torch.bfloat16
    """What engines decode to, which every matrix notes."""

    def for_model(self, dtype: torch.dtype) -> "BitsAndBytes":
        return BitsAndBytes(dtype)

    def native(self, scheme: AnyScheme, dtype: torch.dtype) -> AnyScheme:
        grid = scheme.weight
        is_integer = isinstance(grid, IntGrid) and (grid.bits_per_code, grid.granularity, grid.symmetric) == (
            8,
            "channel",
            True,
        )
        return (
            LLM_INT8
            if scheme.activations in (None, LLM_INT8.activations) and (is_integer or isinstance(grid, LLMInt8))
            else scheme
        )

    def check(self, scheme: AnyScheme, shape: Shape) -> None:
        grid = _held(scheme)
        if isinstance(grid, AbsmaxGrid):
            grid.require_width(shape)

    def same(self, q: Quantized) -> Quantized | None:
        if isinstance(q.grid, LLMInt8):
            return q._replace(activations=ActivationQuant(LLM_INT8.activations, {}))
        return q if isinstance(q.grid, AbsmaxGrid) and not q.activations else None

    def plan(self, scheme: AnyScheme, shape: Shape) -> dict[str, Spec]:
        grid, (out, width) = _held(scheme), shape
        if isinstance(grid, LLMInt8):
            return {
                "weight": Spec((out, width), torch.int8),
                "SCB": Spec((out,), torch.float32),
                "weight_format": Spec((), torch.uint8),
            }
        blocks = grid.blocks(shape)
        specs = {
            "weight": Spec((-(-out * width // 2), 1), torch.uint8),
            "weight.absmax": Spec((blocks,), torch.uint8 if grid.double else torch.float32),
            "weight.quant_map": Spec((16,), torch.float32),
            STATE + grid.kind: Spec((len(_state(grid, shape, "", None)) + ROOM,), torch.uint8),
        }
        if grid.double:
            specs["weight.nested_absmax"] = Spec((-(-blocks // NESTED),), torch.float32)
            specs["weight.nested_quant_map"] = Spec((256,), torch.float32)
        return specs

    def parts(self, scheme: AnyScheme, shape: Shape, has: Has) -> dict[str, Part]:
        grid, plan = _held(scheme), self.plan(scheme, shape)
        known = {
            suffix: Part((spec,), optional=suffix == "weight_format")
            for suffix, spec in plan.items()
            if not suffix.startswith(STATE)
        }
        if isinstance(grid, LLMInt8):
            return known
        size_bytes = plan["weight"].size_bytes
        return {
            **known,
            "weight": Part(
                tuple(
                    Spec((size_bytes // dtype.itemsize, 1), dtype)
                    for dtype in STORAGE
                    if size_bytes % dtype.itemsize == 0
                )
            ),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        grid, params = _held(q.scheme), q.params
        if isinstance(grid, LLMInt8):
            weight = (q.codes.int() - ZERO).to(torch.int8)
            return {"weight": weight, "SCB": params["absmax"], "weight_format": torch.zeros((), dtype=torch.uint8)}
        offset = params["offset"].item() if grid.double else None
        state = _state(grid, q.shape, DTYPES[self.dtype], offset)
        length = self.plan(q.scheme, q.shape)[STATE + grid.kind].shape[0]
        pairs = torch.nn.functional.pad(q.codes.flatten(), (0, q.codes.numel() % 2)).view(-1, 2)
        tensors = {
            "weight": pairs[:, :1] << 4 | pairs[:, 1:],
            "weight.absmax": params["scale"].flatten(),
            "weight.quant_map": levels(grid.kind),
            STATE + grid.kind: torch.frombuffer(bytearray(state.ljust(length)), dtype=torch.uint8),
        }
        if grid.double:
            tensors["weight.nested_absmax"] = params["nested"]
            tensors["weight.nested_quant_map"] = dynamic_map()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: AnyScheme, shape: Shape) -> Quantized:
        grid, (out, width) = _held(scheme), shape
        if isinstance(grid, LLMInt8):
            if tensors.get("weight_format", torch.zeros(1)).any():
                raise Unsupported(
                    "LLM.int8() weights in the order of an old GPU (weight_format) are not read; load them with bitsandbytes and save them again"
                )
            return Quantized(
                grid,
                (tensors["weight"].int() + ZERO).to(torch.uint8),
                {"absmax": tensors["SCB"].flatten()},
                ActivationQuant(LLM_INT8.activations, {}),
            )
        _require_same("quant_map", tensors["weight.quant_map"], levels(grid.kind))
        raw = tensors["weight"].contiguous().flatten().view(torch.uint8)
        codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: out * width].view(out, width)
        params = {"scale": tensors["weight.absmax"].view(1 if width % grid.group else out, -1)}
        if grid.double:
            _require_same("nested_quant_map", tensors["weight.nested_quant_map"], dynamic_map())
            offset = _parsed(tensors[STATE + grid.kind])["nested_offset"]
            params |= {"nested": tensors["weight.nested_absmax"], "offset": torch.tensor([offset], dtype=torch.float32)}
        return Quantized(grid, codes, params)

    def config(self, schemes: Mapping[str, AnyScheme], kept: list[str], dtype: torch.dtype) -> Config:
        grid = _held(commonest(schemes))
        four = isinstance(grid, AbsmaxGrid)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": grid.kind if four else "fp4",
            "bnb_4bit_use_double_quant": four and grid.double,
            "bnb_4bit_compute_dtype": DTYPES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(kept),
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }

    def reads(self, config: Config) -> bool:
        # Older versions of Transformers did not write the method.
        return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(
            config.get("load_in_4bit") or config.get("load_in_8bit")
        )

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[AnyScheme, Shape]]:
        found: dict[str, tuple[AnyScheme, Shape]] = {}
        for name in entries:
            module, _, kind = name.rpartition(f".{STATE}")
            if module:
                said = _said(name, entries)
                grid = AbsmaxGrid.parse(f"{kind}-g{said['blocksize']}{'-double' if 'nested_blocksize' in said else ''}")
                if grid.double and said["nested_blocksize"] != NESTED:
                    raise Unsupported(
                        f"{module}: scales that share a scale by {said['nested_blocksize']} are not read; by {NESTED} they are"
                    )
                found[module] = (grid, tuple(said["shape"]))
                grid.require_width(found[module][1])
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                found[module] = (LLM_INT8, stored(entries, f"{module}.weight", [torch.int8]).shape)
        return found


def _held(scheme: AnyScheme) -> AbsmaxGrid | LLMInt8:
    grid = scheme.weight
    if not isinstance(grid, AbsmaxGrid | LLMInt8) or scheme.activations not in (None, LLM_INT8.activations):
        kinds = " and ".join(LEVELS)
        raise Unsupported(
            f"bitsandbytes holds {kinds} in blocks (such as nf4-g64 or nf4-g64-double) and int8-channel, not {scheme}"
        )
    return grid


def _state(grid: AbsmaxGrid, shape: Shape, dtype: str, offset: float | None) -> bytes:
    """What bitsandbytes notes beside the tensors of a matrix."""
    said = {"quant_type": grid.kind, "blocksize": grid.group, "dtype": dtype, "shape": list(shape)}
    if grid.double:
        said |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(said).encode()


def _said(name: str, entries: Mapping[str, Entry]) -> Config:
    """What is noted of a matrix. Raises BadCheckpoint for what bitsandbytes would not note."""
    state = stored(entries, name, [torch.uint8], 1)
    said = _parsed(state.read()) if state.size_bytes <= LONGEST_STATE else {}
    shape = said.get("shape")
    is_shape = (
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    )
    is_double = "nested_blocksize" in said
    if (
        not is_shape
        or type(said.get("blocksize")) is not int
        or "dtype" not in said
        or (is_double and type(said.get("nested_offset")) is not float)
    ):
        raise BadCheckpoint(f"'{name}' does not say what block, shape and dtype a matrix has; download it again")
    return said


def _parsed(state: Tensor) -> Config:
    said = parse_json(state.numpy().tobytes())
    return said if isinstance(said, dict) else {}


def _require_same(name: str, found: Tensor, known: Tensor) -> None:
    if not torch.equal(found.float(), known):
        raise Unsupported(
            f"a {name} that is not bitsandbytes' own is not read; engines with kernels for 4 bits would not read it either"
        )
