"""AWQ, version GEMM (casper-hansen/AutoAWQ, modules/linear/gemm.py and utils/packing_utils.py).

qweight  int32 [in, out / 8], packed along out, eight columns to a word in the order 0 2 4 6 1 3 5 7
qzeros   int32 [groups, out / 8], likewise; the zero point itself
scales   fp16  [groups, out]
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
    PartSpec,
    any_of,
    commonest,
    exact_half,
    fits_half,
    granularity_of,
    integer,
    stored,
)
from halfbyte.containers.gptq import SCALE_NAME, scale_held, stored_scale
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALE_DTYPES, integers

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AWQ(Container):
    """4 bits per group or channel. A symmetric grid is held with every zero point 8."""

    name = "awq"
    mixes = False

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """int4 with scales that both fp16 and the model's dtype hold. Raises Unsupported for other grids."""
        return integer(scheme, self.name).with_scale(stored_scale(dtype))

    def check(self, scheme: Scheme, shape: Shape) -> None:
        """Raise Unsupported unless it is int4 per group or channel, with a multiple of 8 out-features."""
        grid, (out, _) = integer(scheme, self.name), shape
        if grid.levels.bits != 4 or grid.granularity == "tensor":
            raise Unsupported(f"awq holds int4 per group or channel, not {grid}")
        if out % 8:
            raise Unsupported(f"awq packs eight out-features to a word, which {out} do not fill")

    def cast_exact(self, q: Quantized) -> Quantized | None:
        """Integers whose scales are exact in fp16; None for others."""
        return same if (same := super().cast_exact(q)) and fits_half(q.params["scale"]) else None

    def plan(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        """Packed weights, packed zero points and fp16 scales."""
        grid, (out, width) = integer(scheme, self.name), shape
        groups = grid.groups(width)
        return {
            "qweight": Spec((width, out // 8), torch.int32),
            "qzeros": Spec((groups, out // 8), torch.int32),
            "scales": Spec((groups, out), torch.float16),
        }

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """As `plan`; others write scales in bf16 and fp32 too."""
        return {
            **super().parts(scheme, shape, has),
            "scales": any_of([self.plan(scheme, shape)["scales"].shape], SCALE_NAME),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Eight out-features to a word, in AutoAWQ's order."""
        zero = q.params.get("zero", torch.full_like(q.params["scale"], 8, dtype=torch.uint8))
        return {
            "qweight": _pack(q.codes),
            "qzeros": _pack(zero),
            "scales": exact_half(q.params["scale"]).T.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """Codes and zero points in their own order again; no zero points for a symmetric grid."""
        grid, (out, _) = integer(scheme, self.name), shape
        params = {"scale": tensors["scales"].T.contiguous().to(SCALE_DTYPES[grid.scale])}
        if not grid.symmetric:
            params["zero"] = _unpack(tensors["qzeros"], out)
        return Quantized(grid, _unpack(tensors["qweight"], out), params)

    def config(self, schemes: Mapping[str, Scheme], unquantized: list[str], dtype: torch.dtype) -> Config:
        """AutoAWQ's `quantization_config`, with the unquantized modules by name."""
        grid = integer(commonest(schemes), self.name)
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": grid.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            # vLLM and SGLang take the head for 16 bits unless told so (vllm auto_awq.py, sglang awq/awq.py
            # from_config).
            **({"lm_head": True} if "lm_head" in schemes else {}),
            "modules_to_not_convert": sorted(unquantized) or None,
        }

    def extra_files(self, config: Config) -> dict[str, Config]:
        """quant_config.json, which AutoAWQ reads."""
        return {
            "quant_config.json": {
                "zero_point": True,
                "q_group_size": config["group_size"],
                "w_bit": 4,
                "version": "GEMM",
            }
        }

    def reads(self, config: Config) -> bool:
        """Whether `quant_method` is awq."""
        return config.get("quant_method") == "awq"

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """Every module with a qweight: symmetric where all zero points are 8. Raises Unsupported for versions but
        GEMM."""
        if str(config.get("version", "gemm")).lower() != "gemm":
            raise Unsupported(f"awq version '{config['version']}' is not read; gemm is")
        modules: dict[str, tuple[Scheme, Shape]] = {}
        for name in entries:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                qweight, qzeros = (
                    stored(entries, name, [torch.int32]),
                    stored(entries, f"{module}.qzeros", [torch.int32]),
                )
                scales = stored(entries, f"{module}.scales", SCALE_NAME)
                symmetric = bool((qzeros.read() == -0x77777778).all())  # 0x88888888: every zero point 8
                granularity = granularity_of(module, qweight.shape[0], scales.shape[0], [config.get("group_size")])
                modules[module] = (
                    integers(4, granularity, symmetric, scale_held(scales)),
                    (qweight.shape[1] * 8, qweight.shape[0]),
                )
        return modules


def _pack(codes: Tensor) -> Tensor:
    columns = codes.T.reshape(codes.shape[1], -1, 8)[..., ORDER]
    return bits.pack(columns.reshape(codes.shape[1], -1), 4)


def _unpack(words: Tensor, out: int) -> Tensor:
    columns = bits.unpack(words, 4, out).view(words.shape[0], -1, 8)[..., INVERSE]
    return columns.reshape(words.shape[0], out).T.contiguous()
