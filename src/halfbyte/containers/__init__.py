"""How bits lie in a folder of safetensors. To add a container: one file, and one line in `halfbyte.registry`."""

from halfbyte import registry
from halfbyte.containers.container import Container, Reader

CONTAINERS: dict[str, Container] = registry.made(registry.CONTAINERS)
READERS: dict[str, Reader] = {**CONTAINERS, **registry.made(registry.READ_ONLY)}

__all__ = ["CONTAINERS", "READERS", "Container", "Reader"]
