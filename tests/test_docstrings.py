"""Every public name says what it is, itself or where it is defined first."""

import importlib
import inspect
import pkgutil

import pytest

import halfbyte

ROOMS = (
    *("api", "cli", "demonstration", "display", "endings", "engines", "errors", "files", "pipeline", "progress"),
    *("recipe", "report", "terminal", "words"),
)


def modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(halfbyte.__path__, "halfbyte.")]
    return [name for name in found if name.split(".")[1] in ROOMS]


def undocumented(name: str, value: object) -> list[str]:
    """Of a function, or of a class and its methods."""
    found = [] if documentation(value) else [name]
    if inspect.isclass(value):
        members = {key: member for key, member in vars(value).items() if not key.startswith("_")}
        said = {key: documentation(getattr(value, key)) for key, member in members.items() if is_method(member)}
        found += [f"{name}.{key}" for key, words in said.items() if not words]
    return found


def is_method(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)


def documentation(value: object) -> str:
    """None of what dataclasses and named tuples write by themselves."""
    said = (value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)) or ""
    return "" if said.startswith(f"{getattr(value, '__name__', '')}(") else said


@pytest.mark.parametrize("name", modules())
def test_every_public_name_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    for key, value in own.items():
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == name:
            assert not undocumented(key, value)
