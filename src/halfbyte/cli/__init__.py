"""The command line: each command parses, calls one function, and prints what `display` makes of it."""

from halfbyte.cli.entrypoint import app, main
from halfbyte.cli.output import err, out

__all__ = ["app", "err", "main", "out"]
