"""The one tree of errors.

    HalfbyteError          a user's request that cannot be met; its text is one line; the command line exits with 2
    ├── BadCheckpoint      the source is no checkpoint, or is broken: missing shard, truncated file, NaN
    ├── BadRequest         a name, option or file of the request is wrong
    │   └── UnknownName    not in a table; the nearest names are offered
    ├── Unsupported        a grid, layout or engine that cannot hold what was asked
    └── BrokenOutput       what was written does not read back as what was solved
"""

import difflib
from collections.abc import Iterable


class HalfbyteError(Exception):
    """A request that cannot be met: what was asked, what is wrong with it, what would work."""


class BadCheckpoint(HalfbyteError):
    """The source cannot be read as a checkpoint."""


class BadRequest(HalfbyteError):
    """A word of the request is wrong."""


class UnknownName(BadRequest):
    """A name that is in no table."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} '{name}'; {hint}")


class Unsupported(HalfbyteError):
    """A combination that the format or the engine cannot hold."""


class BrokenOutput(HalfbyteError):
    """The written file does not decode to what the solver returned."""
