"""Makes gptqmodel.safetensors: what GPTQModel decodes our gptq and awq tensors to, and tensors that it packed itself.

Run it where gptqmodel 7.7.0 is installed (its metadata wants a newer torch than it needs: pip install --no-deps):

    GPTQMODEL_CPU_WORKERS=2 PYTHONPATH=src python tests/goldens/make.py
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file

from halfbyte.containers.awq import AWQ
from halfbyte.containers.gptq import GPTQ
from halfbyte.grids import parse
from halfbyte.grids.quantized import Quantized

OUT, WIDTH = 64, 128
CASES = [
    ("gptq", "int4-g32"), ("gptq", "int4-g32-asym"), ("gptq", "int3-g32"), ("gptq", "int3-g32-asym"), ("gptq",
    "int2-g64"), ("gptq", "int2-g64-asym"),
    ("gptq", "int8-channel"), ("gptq", "int8-g32-asym"), ("awq", "int4-g32"), ("awq", "int4-g32-asym"), ("awq",
    "int4-channel-asym"),
]  # fmt: skip


def linear(bits: int, group: int, symmetric: bool) -> TorchLinear:
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=False, in_features=WIDTH, out_features=OUT, bias=False
    )
    return module.eval()


def theirs(tensors: dict[str, torch.Tensor], bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """[out, in], as GPTQModel decodes a version 1 file."""
    module = linear(bits, group, symmetric)
    for name, tensor in tensors.items():
        getattr(module, name).data.copy_(tensor)
    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return module.dequantize_weight().T.contiguous()


saved: dict[str, torch.Tensor] = {}
generator = torch.Generator().manual_seed(0)
for container, name in CASES:
    grid, w = parse(name), torch.randn(OUT, WIDTH, generator=generator) * 0.05
    w[3] += 0.2  # a row of one sign: its zero point is at the end of the range
    params = grid.fit(w, None)
    q = Quantized(grid, grid.encode(w, params), params)
    packed = (GPTQ() if container == "gptq" else AWQ()).pack(q)
    group = grid.group_size or WIDTH
    if container == "gptq":
        decoded = theirs(packed, grid.levels.bits, group if grid.group_size else -1, grid.symmetric)
    else:
        decoded = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, group).T.contiguous()
    saved |= {f"{container}/{name}/{suffix}": tensor for suffix, tensor in packed.items()}
    saved[f"{container}/{name}/decoded"] = decoded
# Tensors of their own packing, symmetric and not: scales and zero points are chosen here, the codes and bits are
# theirs.
for name in ("int4-g32", "int4-g32-asym"):
    grid, w = parse(name), torch.randn(OUT, WIDTH, generator=generator) * 0.05
    params = grid.fit(w, None, search=False)
    zero = params.get("zero", torch.full_like(params["scale"], 8, dtype=torch.uint8))
    module, dense = linear(4, 32, grid.symmetric), torch.nn.Linear(WIDTH, OUT, bias=False)
    dense.weight.data.copy_(w)
    module.pack_original(dense, params["scale"].float(), zero.float(), torch.arange(WIDTH, dtype=torch.int32) // 32)
    saved |= {
        f"theirs/{name}/{suffix}": getattr(module, suffix).clone()
        for suffix in ("qweight", "qzeros", "scales", "g_idx")
    }
    module.post_init()
    saved[f"theirs/{name}/decoded"] = module.dequantize_weight().T.contiguous()
save_file(saved, Path(__file__).parent / "gptqmodel.safetensors")
