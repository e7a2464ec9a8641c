"""Names that people write, and what somebody most likely means by one that is in no table.

All are checked before torch is imported, which takes seconds: the tables that are read here need none.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import cast

from halfbyte.errors import BadRequest, UnknownName
from halfbyte.formats import (
    ALIASES,
    DTYPES,
    KQUANTS,
    LATTICES,
    MULTIPLIED,
    PATTERNS,
    SCALARS,
    SCHEMES,
    Activations,
    require_activations,
)
from halfbyte.recipe import PARTS
from halfbyte.registry import CONTAINERS as FOLDERS
from halfbyte.registry import FORMS, READ_ONLY

GRIDS = (*SCALARS, *KQUANTS, *LATTICES)
CONTAINERS = (*FOLDERS, *(name for name, form in FORMS.items() if form.quantized))
PLAIN = tuple(name for name, form in FORMS.items() if form.unquantized)
FILES = {form.suffix: name for name, form in FORMS.items() if form.suffix}
"""Containers of outputs that are one file, by what such a file's name ends with."""
OWN = {name: import_module(form.own_names) for name, form in FORMS.items() if form.own_names}
"""What containers call their grids that call them otherwise."""
PRESETS = tuple(name for own in OWN.values() for name in own.PRESETS)
OWN_NAMES = tuple(name for own in OWN.values() for name in own.NAMES)
BITS = re.compile(r"(?:u?int|w|q)?([2-8])(?:b|bits?)?")
PRESET_OF_BITS = {"2": "Q2_K", "3": "Q3_K_M", "4": "Q4_K_M", "5": "Q5_K_M", "6": "Q6_K", "8": "Q8_0"}


def own_name(container: str, grid: str) -> str:
    """What a container calls a grid, where it has names of its own."""
    types = OWN[container].TYPES if container in OWN else {}
    return {ALIASES.get(kind, kind): name for name, kind in types.items()}.get(grid, grid)


def require_container(name: str) -> None:
    """Raises UnknownName."""
    if name not in (*CONTAINERS, *READ_ONLY):
        raise UnknownName("container", name, CONTAINERS)


def owner_of(grid: str) -> str | None:
    """The container that has such a grid of its own."""
    return next((name for name, own in OWN.items() if grid.upper() in own.NAMES), None)


def grid_in_name(output: Path) -> str | None:
    """What the name of an output that is one file says that it holds, where such files are called by that."""
    own = OWN.get(FILES.get(output.suffix, ""))
    return own.in_name(output.stem) if own else None


def dtype_in_name(output: Path) -> str | None:
    """The same, if it is a precision that does not quantize."""
    own = OWN.get(FILES.get(output.suffix, ""))
    return own.DTYPES.get(own.in_name(output.stem)) if own else None


def require_grid(name: str, container: str | None = None) -> None:
    """Raise BadRequest for what no grid, scheme, preset or type is called, or is called like; `container`: where it is
    asked for."""
    weight, slash, read = name.lower().partition("/")
    known = {other.lower() for other in (*GRIDS, *ALIASES, *SCHEMES, *OWN_NAMES)}
    if weight not in known and not any(pattern.match(weight) for pattern in PATTERNS):
        raise unknown_grid(weight if slash else name, container, alone=not slash)
    if slash:
        require_activations(read)


def require_plain(to: str | None, dtype: str | None) -> None:
    """Raise BadRequest for a container or a precision in which nobody writes 16 bits; what is None has a default."""
    if to is not None and to not in PLAIN:
        raise BadRequest(f"16 bits are written as {' or '.join(PLAIN)}, not as {to}")
    if dtype is not None:
        require_dtype(dtype)


def require_multiplied(name: str) -> Activations:
    """Raise UnknownName for what activations are not multiplied as."""
    if name not in MULTIPLIED:
        raise UnknownName("way to take activations", name, MULTIPLIED)
    return cast(Activations, name)


def require_dtype(name: str) -> str:
    """Raise UnknownName for what no dtype is called."""
    if name not in DTYPES:
        raise UnknownName("dtype", name, DTYPES)
    return name


def unknown_grid(name: str, container: str | None = None, alone: bool = True) -> BadRequest:
    """The error to raise where a grid is wanted, of a container if that is known; `alone`: and not how activations are
    rounded too, of which schemes and containers' own names say nothing or all.

    Names that are the same but for their dashes come first, then the usual ones of as many bits, then those that begin
    so.
    """
    plain = _plain(name)
    if any(plain in (_plain(part), _plain(f"{part}+gptq")) for part in PARTS):
        grid = "w8a8" if "smoothquant" in plain else "int4-g128"
        return BadRequest(
            f"'{name}' is a method, not a grid; write --method {name.lower()} with a grid such as --grid {grid}"
        )
    own = OWN.get(container or "") if alone else None
    kind, names = (
        (own.KIND, own.NAMES) if own else ("grid", (*GRIDS, *ALIASES, *((*SCHEMES, *PRESETS) if alone else ())))
    )
    known = list(dict.fromkeys(names))
    meant = [other for other in known if _plain(other) == plain]
    if match := BITS.fullmatch(plain):
        usual = [f"int{match[1]}-{'channel' if match[1] == '8' else 'g128'}", PRESET_OF_BITS.get(match[1])]
        meant += [other for other in usual if other in known]
    meant += [other for other in known if plain and _plain(other).startswith(plain) and not match]
    return UnknownName(kind, name, known, list(dict.fromkeys(meant))[:3])


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())
