"""A form of output is known in its own folder: all else asks the table, and nobody asks what class something is."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte
from halfbyte.containers.table import READERS
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.table import TARGETS

ROOT = Path(halfbyte.__file__).parent
OWN = ("targets/gguf", "demo")
REGISTRIES = {
    "registry.py": "the tables of forms of output and of checkpoints",
    "engines/engines.py": "what each engine loads, and by which names it is called",
    "demonstration.py": "the rows of the demo",
    "kernels/lattice.py": "the package gguf, which has ggml's codebooks",
}
"""Where the word stands beside texts for people, and why."""


def words_of_code(path: Path) -> Iterator[str]:
    """Names, and strings without a blank: texts for people, docstrings and comments have one."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME or (token.type == tokenize.STRING and " " not in token.string):
            yield token.string


def sources() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if not path.relative_to(ROOT).as_posix().startswith(OWN)]


def test_templates_know_no_form_of_output():
    assert not [path for path in ROOT.rglob("*.jinja") if "gguf" in path.read_text(encoding="utf-8").lower()]


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_gguf_is_known_in_its_own_room(path):
    found = {word for word in words_of_code(path) if "gguf" in word.lower()}
    assert not found or path.relative_to(ROOT).as_posix() in REGISTRIES, found


def test_every_registry_is_one():
    assert {name for name in REGISTRIES if any("gguf" in word.lower() for word in words_of_code(ROOT / name))} == {
        *REGISTRIES
    }


def kinds() -> set[str]:
    """Classes of targets, containers and checkpoints."""
    found = {type(value).__name__ for value in (*TARGETS.values(), *READERS.values())}
    return found | {kind.__name__ for kind in Checkpoint.__subclasses__()} | {"Target", "Container", "Reader"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nobody_asks_what_class_it_is(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            asked = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            assert not asked & kinds(), ast.unparse(node)
