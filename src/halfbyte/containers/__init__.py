"""How bits lie in a folder of safetensors. To add a container: one file, and one line here."""

from halfbyte.containers.awq import AWQ
from halfbyte.containers.bitsandbytes import BitsAndBytes
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.container import Container, Reader
from halfbyte.containers.fp8 import FP8
from halfbyte.containers.gptq import GPTQ
from halfbyte.containers.modelopt import ModelOpt
from halfbyte.containers.mxfp4 import MXFP4

CONTAINERS: dict[str, Container] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ(),
    "awq": AWQ(),
    "bitsandbytes": BitsAndBytes(),
    "fp8": FP8(),
}
FOREIGN: dict[str, Reader] = {
    "mxfp4": MXFP4(),
    "modelopt": ModelOpt(),
}
"""What other tools write, and is read only; compressed-tensors holds the same values."""
READERS: dict[str, Reader] = {**CONTAINERS, **FOREIGN}

__all__ = [
    "AWQ",
    "CONTAINERS",
    "FOREIGN",
    "FP8",
    "GPTQ",
    "READERS",
    "BitsAndBytes",
    "CompressedTensors",
    "Container",
    "Reader",
]
