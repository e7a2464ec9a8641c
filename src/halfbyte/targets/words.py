"""What somebody most likely means by a grid that is in no table."""

import re

from halfbyte import grids
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids import schemes
from halfbyte.recipe import PARTS
from halfbyte.targets.gguf import presets
from halfbyte.targets.gguf.container import LAYOUTS

BITS = re.compile(r"(?:u?int|w|q)?([2-8])(?:b|bits?)?")
PRESET_OF_BITS = {"2": "Q2_K", "3": "Q3_K_M", "4": "Q4_K_M", "5": "Q5_K_M", "6": "Q6_K", "8": "Q8_0"}


def unknown_grid(name: str, ggufs: bool = False) -> BadRequest:
    """The error to raise where grids are wanted, or types of GGUF if `ggufs`.

    Names that are the same but for their dashes come first, then the usual ones of as many bits, then those that begin so.
    """
    plain = _plain(name)
    if any(plain in (_plain(part), _plain(f"{part}+gptq")) for part in PARTS):
        grid = "w8a8" if "smoothquant" in plain else "int4-g128"
        return BadRequest(
            f"'{name}' is a method, not a grid; write --method {name.lower()} with a grid such as --grid {grid}"
        )
    known = list(
        dict.fromkeys(
            (*presets.PRESETS, *LAYOUTS)
            if ggufs
            else (*grids.GRIDS, *grids.ALIASES, *schemes.PRESETS, *presets.PRESETS)
        )
    )
    meant = [other for other in known if _plain(other) == plain]
    if match := BITS.fullmatch(plain):
        usual = [f"int{match[1]}-{'channel' if match[1] == '8' else 'g128'}", PRESET_OF_BITS.get(match[1])]
        meant += [other for other in usual if other in known]
    meant += [other for other in known if plain and _plain(other).startswith(plain) and not match]
    return UnknownName("preset or type of GGUF" if ggufs else "grid", name, known, list(dict.fromkeys(meant))[:3])


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())
