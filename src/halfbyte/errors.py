"""The one tree of errors.

HalfbyteError          a user's request that cannot be met; its text is one line; the command line exits with 2
├── BadCheckpoint      the source is no checkpoint, or is broken: missing shard, truncated file, NaN
├── BadRequest         a name, option or file of the request is wrong
│   └── UnknownName    not in a table; the nearest names are offered
├── Unsupported        a grid, layout or engine that cannot hold what was asked
├── BrokenOutput       what was written does not read back as what was solved
└── OutOfMemory        a device has too little memory, whatever is done in parts
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral

LISTED = 12
"""Known names that a message lists where none is near."""

SHOWN = 120
"""Characters of a value that a message shows."""


class HalfbyteError(Exception):
    """A request that cannot be met: what was asked, what is wrong with it, what would work."""


class BadCheckpoint(HalfbyteError):
    """The source cannot be read as a checkpoint."""


class BadRequest(HalfbyteError):
    """A word of the request is wrong."""


class UnknownName(BadRequest):
    """A name that is in no table."""

    def __init__(self, kind: str, name: str, known: Iterable[str], meant: Sequence[str] = ()):
        """`meant` are the known names that it most likely stands for, where the caller can tell."""
        known = list(known)
        near = meant or nearest(name, known)
        some = known[:: -(-len(known) // LISTED)]
        listed = (
            f"known: {', '.join(known)}"
            if len(some) == len(known)
            else f"known are {len(known)}, such as {', '.join(some)}"
        )
        super().__init__(f"unknown {kind} '{name}'; " + (f"did you mean {' or '.join(near)}?" if near else listed))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`; those that begin as it does come first."""

    def likeness(other: str) -> float:
        a, b = name.lower(), other.lower()
        same_start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return difflib.SequenceMatcher(None, a, b).ratio() + same_start / 20

    return [other for other in sorted(known, key=likeness, reverse=True) if name and likeness(other) > 0.5][:count]


def brief(value: object) -> str:
    """What a message shows of a value that anybody may have made."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = cut.maxlong = SHOWN
    try:
        shown = cut.repr(value)
    except ValueError:  # of a number of thousands of digits
        shown = (
            f"a number near 2^{int(value).bit_length()}" if isinstance(value, int) else f"some {type(value).__name__}"
        )
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def plural(number: int, noun: str, several: str = "") -> str:
    """A number with its noun: 1 window, 2 windows."""
    return f"{number} {noun if number == 1 else several or noun + 's'}"


def require_at_least(least: int, **counts: object) -> None:
    """Raises BadRequest for an argument, by its name, that is no whole number or a smaller one."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < least:
            raise BadRequest(f"{name} is {brief(count)}, and has to be a whole number, {least} at least")


class Unsupported(HalfbyteError):
    """A combination that the format or the engine cannot hold."""


class BrokenOutput(HalfbyteError):
    """The written file does not decode to what the solver returned."""


class OutOfMemory(HalfbyteError):
    """A device has too little memory even for the smallest part of the work."""
