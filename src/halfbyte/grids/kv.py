"""How engines round keys and values before they keep them in a KV cache.

fp8-e4m3           one stored scale for the keys of a layer and one for its values; also called fp8-e4m3-static
fp8-e4m3-head      ... for those of each head
int8, int8-token   a scale for each token and head, found as the engine runs: nothing is stored
int4, int4-g32     a scale for 32 values of a token and head, likewise; any other group too
q8_0, q4_0 ...     llama.cpp's own
K/V                keys and values differently, such as int8-token/int4-g32
"""

from dataclasses import dataclass

from halfbyte.formats import GGML_CACHES, cache_parts
from halfbyte.grids.activations import ActivationGrid, ScaledActivations
from halfbyte.grids.ggml_cache import GGMLCacheGrid


@dataclass(frozen=True)
class KVGrid:
    """How keys and values are rounded."""

    key: ActivationGrid
    value: ActivationGrid

    @classmethod
    def parse(cls, name: str) -> "KVGrid":
        """Raises BadRequest for what no cache can do."""
        key, value = cache_parts(name)
        return cls(_part(key, is_key=True), _part(value, is_key=False))

    def __str__(self) -> str:
        return str(self.key) if str(self.key) == str(self.value) else f"{self.key}/{self.value}"

    @property
    def static(self) -> bool:
        """Whether scales are stored, which calibration has to find."""
        return self.key.static or self.value.static


def _part(name: str, is_key: bool) -> ActivationGrid:
    return GGMLCacheGrid.parse(name, is_key) if name in GGML_CACHES else ScaledActivations.parse(name)
