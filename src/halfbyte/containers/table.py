"""The table of containers: those that are written, and all that are read."""

from halfbyte import registry
from halfbyte.containers.container import Container, Reader

CONTAINERS: dict[str, Container] = registry.made(registry.CONTAINERS)
READERS: dict[str, Reader] = {**CONTAINERS, **registry.made(registry.READ_ONLY)}
