"""Words to a scheme: a grid of weights, and after a slash how inputs are rounded. Some have names
(`formats.SCHEMES`)."""

from collections.abc import Iterable

from halfbyte import grids
from halfbyte.errors import UnknownName
from halfbyte.formats import ALIASES, SCHEMES
from halfbyte.grids import activations
from halfbyte.grids.quantized import Scheme, WeightActivation


def is_mixture(name: str) -> bool:
    """Whether a name stands for several schemes."""
    return name.lower() in SCHEMES and bool(SCHEMES[name.lower()].others)


def of_others(name: str, modules: Iterable[str]) -> dict[str, Scheme | None]:
    """Modules that a preset gives another scheme than most, with that; None: they stay in 16 bits."""
    rules = SCHEMES[name.lower()].others if name.lower() in SCHEMES else {}
    matches = {m: next((scheme for rule, scheme in rules.items() if rule.search(m)), None) for m in modules if rules}
    return {m: None if scheme == "keep" else parse(scheme) for m, scheme in matches.items() if scheme}


def parse(name: str) -> Scheme:
    """`str(parse(name)) == name` for names that are no presets."""
    name = name.lower()
    scheme = SCHEMES[name].scheme if name in SCHEMES else name
    weight, slash, read = scheme.partition("/")
    try:
        grid = grids.parse(weight)
    except UnknownName:
        raise UnknownName("grid", weight, (*grids.GRIDS, *ALIASES, *SCHEMES)) from None
    return WeightActivation(grid, activations.parse(read)) if slash else grid
