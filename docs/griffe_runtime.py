"""Docstrings that are completed as a module is imported, as the reference has to show them."""

import inspect
from pkgutil import resolve_name
from typing import Any

import griffe


class Runtime(griffe.Extension):
    """Reads those with a part in braces from the imported function."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called of each function that is read."""
        if func.docstring and "{arguments}" in func.docstring.value:
            func.docstring.value = inspect.getdoc(resolve_name(f"{func.module.path}:{func.name}")) or ""
