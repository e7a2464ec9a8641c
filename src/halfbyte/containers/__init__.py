"""How bits lie in a file. To add a container: one file, and one line here."""

from halfbyte.containers.awq import AWQ
from halfbyte.containers.bitsandbytes import BitsAndBytes
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.container import ConfigContainer, Container
from halfbyte.containers.fp8 import FP8
from halfbyte.containers.gptq import GPTQ
from halfbyte.containers.modelopt import ModelOpt
from halfbyte.containers.mxfp4 import MXFP4
from halfbyte.containers.read_only import ReadOnly
from halfbyte.errors import UnknownName
from halfbyte.targets.gguf.container import GGUF

CONTAINERS: dict[str, type[Container]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "fp8": FP8,
    "gguf": GGUF,
}
READ_ONLY: dict[str, type[ReadOnly]] = {
    "mxfp4": MXFP4,
    "modelopt": ModelOpt,
}
"""What is read and never written."""

__all__ = [
    "AWQ",
    "CONTAINERS",
    "FP8",
    "GGUF",
    "GPTQ",
    "READ_ONLY",
    "BitsAndBytes",
    "CompressedTensors",
    "ConfigContainer",
    "Container",
    "container_named",
]


def container_named(name: str) -> Container:
    if name in READ_ONLY:
        READ_ONLY[name]().refuse()
    if name not in CONTAINERS:
        raise UnknownName("container", name, CONTAINERS)
    return CONTAINERS[name]()
