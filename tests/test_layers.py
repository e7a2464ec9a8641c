"""Imports point one way: a module may import from layers below its own, and from its own package."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(halfbyte.__file__).parent
LAYERS = [
    ["errors", "surroundings", "endings", "terminal"], ["files", "progress", "names", "formats", "devices"],
    ["registry"], ["kernels"], ["recipe", "grids"],
    ["solvers", "containers"], ["demo"], ["models"],
    ["transforms", "engines", "block_solvers"], ["refinements"], ["targets"], ["words"], ["packed"], ["multiplying"],
    ["nn"], ["evaluation", "plan"], ["arguments"], ["report"], ["sizing"], ["inference"], ["run", "display", "budget"],
    ["streaming", "polish"],
    ["blockwise", "kv_cache"], ["pipeline", "publish", "against"], ["api"], ["demonstration"], ["cli"],
    ["__main__", "__init__"],
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "halfbyte":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("halfbyte.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upward = {name for name in imported(path) - {own} if RANK[name] >= RANK[own]}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)} from above"


def test_every_module_has_its_layer():
    assert {
        p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    } == set(RANK)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without its signature, which has a line for each argument, and what documents it."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_fit_a_screen():
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": lines_of(node)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > 50
    }
    assert not long


def distributions(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[<>=\[]", words)[0]) for words in requirements}


def canonical(name: str) -> str:
    """As package indices compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_depended_on_is_what_the_source_imports():
    nodes = [n for path in ROOT.rglob("*.py") for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    packages = {name.partition(".")[0] for name in found} - {"halfbyte"} - sys.stdlib_module_names
    owners = packages_distributions()  # of what is installed: extras need not be
    imported = {canonical(owner) for package in packages for owner in owners.get(package, ())}
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = distributions(project["dependencies"])
    extras = distributions([words for extra in project["optional-dependencies"].values() for words in extra])
    assert needed <= imported <= needed | extras
