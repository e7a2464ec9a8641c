"""GPTQ (ModelCloud/GPTQModel, nn_modules/qlinear/__init__.py).

    qweight  int32 [in * bits / 32, out], packed along in
    qzeros   int32 [groups, out * bits / 32], packed along out
    scales   fp16  [groups, out]
    g_idx    int32 [in], the group of each in-feature: i // group unless columns were sorted before scales were
                      fitted (desc_act), which is read only

Version 1 (`checkpoint_format: gptq`) stores zero - 1 and its readers add 1, so it cannot hold a zero point of 0;
version 2 (`gptq_v2`) stores the zero point itself. A fresh quantization never needs version 2: see grids.scalar.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.containers import bits
from halfbyte.containers.container import (
    Config,
    Container,
    Has,
    Modules,
    PartSpec,
    any_of,
    commonest,
    described,
    exact_half,
    fits_half,
    granularity_of,
    integer,
    patterns,
    stored,
)
from halfbyte.containers.order import as_ordered, plain_order
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALE_DTYPES, ScalarGrid, integers
from halfbyte.names import FUSED_OF

WIDTHS = (2, 3, 4, 8)
EVERY_EXPERT = r"\.experts\.\d+"


@dataclass(frozen=True)
class GPTQ(Container):
    """GPTQ safetensors of 2, 3, 4 or 8 bits, per group or per channel."""

    name = "gptq"
    version: int = 1

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Integers with scales that both fp16 and the model's dtype hold. Raises Unsupported for other grids."""
        return integer(scheme, self.name).with_scale(stored_scale(dtype))

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported unless it is int2, int3, int4 or int8 per channel or group, and fills whole words."""
        grid, (out, width) = integer(scheme, self.name), shape
        if grid.levels.bits not in WIDTHS or grid.granularity == "tensor":
            raise Unsupported(f"gptq holds int2, int3, int4 and int8 per channel or group, not {grid}")
        for what, size in (("in", width), ("out", out)):
            if size * grid.levels.bits % 32:
                raise Unsupported(
                    f"gptq packs whole 32-bit words: {what}-features {size} x {grid.levels.bits} bits do not fill them"
                )

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """Integers whose scales are exact in fp16; None for others."""
        return same if (same := super().cast_exact(q)) and fits_half(q.params["scale"]) else None

    def for_tensor(self, q: Quantized) -> "GPTQ":
        """Version 2 for a matrix with a zero point of 0, which version 1 cannot hold."""
        return GPTQ(2) if "zero" in q.params and not q.params["zero"].all() else self

    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Packed weights, packed zero points, fp16 scales, and the group of each in-feature."""
        grid, (out, width) = _integers(scheme), shape
        groups = grid.groups(width)
        return {
            "qweight": Spec((width * grid.levels.bits // 32, out), torch.int32),
            "qzeros": Spec((groups, out * grid.levels.bits // 32), torch.int32),
            "scales": Spec((groups, out), torch.float16),
            "g_idx": Spec((width,), torch.int32),
        }

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """As `plan`; others write scales in bf16 and fp32 too, and leave g_idx out."""
        plan = self.plan(scheme, shape)
        scales, order = (
            any_of([plan["scales"].shape], SCALE_NAME),
            any_of([plan["g_idx"].shape], [torch.int32], optional=True),
        )
        return {**super().parts(scheme, shape, has), "scales": scales, "g_idx": order}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Codes packed along in-features, zero points along out-features."""
        grid, width = integer(q.grid, self.name), q.shape[1]
        zero = q.params.get("zero", torch.full_like(q.params["scale"], grid.midpoint, dtype=torch.uint8))
        if self.version == 1:
            if not zero.all():
                raise Unsupported("gptq version 1 cannot hold a zero point of 0; write version 2")
            zero = zero - 1
        return {
            "qweight": bits.pack(q.codes, grid.levels.bits).T.contiguous(),
            "qzeros": bits.pack(zero.T, grid.levels.bits),
            "scales": exact_half(q.params["scale"]).T.contiguous(),
            "g_idx": plain_order(width, grid),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """The inverse of `pack`, in either version. Raises Unsupported for zero points in a file that is called
        symmetric."""
        grid, (out, width) = _integers(scheme), shape
        if scheme == grid and "g_idx" in tensors and not torch.equal(tensors["g_idx"].cpu(), plain_order(width, grid)):
            raise BadCheckpoint(f"in-features are grouped in activation order (g_idx), and not as {grid} has them")
        zero = self._zero_points(tensors["qzeros"], grid.levels.bits, out).T.contiguous()
        params = {"scale": tensors["scales"].T.contiguous().to(SCALE_DTYPES[grid.scale])}
        if not grid.symmetric:
            params["zero"] = zero
        elif not (zero == grid.midpoint).all():
            raise Unsupported(f"zero points differ from {grid.midpoint} in a file that is called symmetric")
        if scheme != grid:
            params["g_idx"] = tensors["g_idx"][None]
        return Quantized(scheme.weight, bits.unpack(tensors["qweight"].T, grid.levels.bits, width), params)

    def _zero_points(self, qzeros: Tensor, width_bits: int, out: int) -> Tensor:
        """Version 1 wraps a zero point of 0 around. GPTQModel, which writes such files, takes 1 from whole words, with
        borrow, but of 3 bits from each code (its utils/model.py, convert_gptq_v2_to_v1_format_module)."""
        if self.version == 2:
            return bits.unpack(qzeros, width_bits, out)
        if width_bits == 3:
            return (bits.unpack(qzeros, 3, out) + 1) & 7
        return bits.unpack(qzeros + 0xFFFFFFFF // ((1 << width_bits) - 1), width_bits, out)

    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """GPTQModel's `quantization_config`: other grids, and unquantized modules, as `dynamic` rules."""
        main = integer(commonest(schemes), self.name)
        dynamic: Config = {}
        for grid in sorted({g for g in schemes.values() if g != main}, key=str):
            members = [name for name, g in schemes.items() if g == grid]
            for pattern in patterns(members, [name for name in schemes if name not in set(members)]):
                dynamic[f"+:^{_either_spelling(pattern)}$"] = _settings(integer(grid, self.name))
        for pattern in patterns([name for name in unquantized if name != "lm_head"], list(schemes)):
            dynamic[f"-:^{_either_spelling(pattern)}$"] = {}
        return {
            "quant_method": "gptq",
            **_settings(main),
            "desc_act": False,
            "lm_head": "lm_head" in schemes,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": 0.01,
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": ["halfbyte"]},
        }

    def extra_files(self, config: Config) -> dict[str, Config]:
        """quantize_config.json, which older readers look for."""
        return {"quantize_config.json": config}

    def reads(self, config: Config) -> bool:
        """Whether `quant_method` is gptq."""
        return config.get("quant_method") == "gptq"

    def find(self, config: Config, entries: Mapping[str, Entry]) -> Modules:
        """Every module with a qweight, as `opened` finds them."""
        return self.opened(config, entries)[1]

    def opened(self, config: Config, entries: Mapping[str, Entry]) -> tuple["GPTQ", Modules]:
        """The version that the zero points show, whatever the label, and every module with a qweight."""
        modules: Modules = {}
        versions = set()
        sizes = [config.get("group_size"), *(rule.get("group_size") for rule in (config.get("dynamic") or {}).values())]
        for name in entries:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                qweight, qzeros = (
                    stored(entries, name, [torch.int32]),
                    stored(entries, f"{module}.qzeros", [torch.int32]),
                )
                scales = stored(entries, f"{module}.scales", SCALE_NAME)
                out, grid_bits, groups = qweight.shape[1], qzeros.shape[1] * 32 // qweight.shape[1], scales.shape[0]
                if grid_bits not in WIDTHS or qzeros.shape != (groups, out * grid_bits // 32):
                    raise BadCheckpoint(
                        f"{module}: {described(qzeros)} zero points are none of {out} out-features in {groups} groups, "
                        "of 2, 3, 4 or 8 bits"
                    )
                width = qweight.shape[0] * 32 // grid_bits
                zero = bits.unpack(qzeros.read(), grid_bits, out)
                first, middle = int(zero[0, 0]), 1 << (grid_bits - 1)
                symmetric = bool((zero == first).all()) and first in (middle - 1, middle)
                if (
                    symmetric
                ):  # the value is the witness: vLLM had to unlearn trusting the label (its pull request 38966)
                    versions.add(1 if first == middle - 1 else 2)
                grid = integers(grid_bits, granularity_of(module, width, groups, sizes), symmetric, scale_held(scales))
                order = f"{module}.g_idx"
                modules[module] = (as_ordered(order, entries.get(order), grid, width), (out, width))
        labelled = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        return GPTQ(versions.pop() if len(versions) == 1 else labelled), modules


def stored_scale(dtype: torch.dtype) -> str:
    """fp16 files of a bf16 model get scales that both formats hold: engines cast them to the model's dtype when they
    load."""
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def scale_held(scales: Entry) -> str:
    """The narrowest format that holds every scale of a file: bf16 for the files that `stored_scale` makes."""
    values = scales.read()
    return "bf16" if torch.equal(values.to(torch.bfloat16).to(values.dtype), values) else SCALE_NAME[values.dtype]


SCALE_NAME = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def _integers(scheme: Scheme) -> ScalarGrid:
    """What the codes are, in whichever order the columns are grouped."""
    return scheme.weight.integers if isinstance(scheme.weight, ActOrderGrid) else integer(scheme, GPTQ.name)


def _settings(grid: ScalarGrid) -> Config:
    return {"bits": grid.levels.bits, "group_size": grid.group_size or -1, "sym": grid.symmetric}


def _either_spelling(pattern: str) -> str:
    """The pattern, that also matches what vLLM makes of such a module: a fused matrix, or all experts as one."""
    head, dot, last = pattern.rpartition(r"\.")
    if last in FUSED_OF and FUSED_OF[last].module:
        last = f"({last}|{FUSED_OF[last].module})"
    if head.endswith(EVERY_EXPERT):
        return f"{head.removesuffix(EVERY_EXPERT)}\\.experts(\\.\\d+\\.{last})?"
    return head + dot + last
