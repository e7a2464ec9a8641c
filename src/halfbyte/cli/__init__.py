"""The command line: each command parses, calls one function, and prints what `display` makes of it."""

from halfbyte.cli.entrypoint import app, main

__all__ = ["app", "main"]
