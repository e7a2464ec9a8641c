"""Compile the kernels that multiply by panels for GPUs that need not be here, down to their machine code.

Prints of each the grid, the kernel, the compute capability, and how many loads are of 16 bytes.
"""

import torch
import triton
from test_panels import paneled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte.kernels.gpu import panels

COMPILED = (("int4-g128", 80), ("nvfp4", 120), ("q2_k", 90))
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}
OPERANDS = ("codes", "scale", "zero", "offset", "d", "dmin", "table", "out", "width", "groups", "unit", "magic")
SMALL = {"rows": 16, "quads": 64}, {"rows": 64, "quads": 16, "tokens": 8, "padded": 16}, {"rows": 64, "quads": 16}
KERNELS = tuple(zip((panels._multiply_one, panels._multiply_some, panels._decode), SMALL, strict=True))


def compiled(kernel, name: str, capability: int, sizes: dict[str, int]):
    """For activations in bfloat16."""
    _, packed = paneled(name, 64, 512)
    x = torch.empty(1, dtype=torch.bfloat16)
    form = panels._form(packed) | sizes
    given = {"x": x, "y": x, "bias": x, "values": x, "first": 64, "step": 64, **form}
    given |= dict(zip(OPERANDS, panels._matrix(packed), strict=True))
    constants = {n for n in kernel.arg_names if given[n] is None or (n in form and n != "tokens")}
    signature = {n: "constexpr" if n in constants else _type(given[n]) for n in kernel.arg_names}
    at = {n: (number,) for number, n in enumerate(kernel.arg_names)}
    aligned = [n for n in kernel.arg_names if n in ("out", "width") or isinstance(given[n], torch.Tensor)]
    source = ASTSource(
        kernel,
        signature,
        {at[n]: given[n] for n in constants},
        {at[n]: [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": panels.WARPS})


def _type(value: torch.Tensor | float) -> str:
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


for name, capability in COMPILED:
    for kernel, sizes in KERNELS:
        made = compiled(kernel, name, capability, sizes)
        assert made.asm["cubin"]
        wide = [line for line in made.asm["ptx"].splitlines() if "ld.global" in line and ".v4.b32" in line]
        print(name, kernel.__name__, capability, len(wide))
