"""The table of targets, and which of them an output's name asks for."""

from pathlib import Path

from halfbyte.containers.place import OutputPath, is_file
from halfbyte.containers.table import CONTAINERS
from halfbyte.errors import UnknownName, Unsupported
from halfbyte.registry import FORMS, READ_ONLY, made
from halfbyte.targets.hf.target import HuggingFace
from halfbyte.targets.target import Target

TARGETS: dict[str, Target] = {
    **{name: HuggingFace(container) for name, container in CONTAINERS.items()},
    **made({name: form.home for name, form in FORMS.items() if form.quantized}),
}
UNQUANTIZED: dict[str, Target] = made({name: form.home for name, form in FORMS.items() if form.unquantized})
"""Those that hold a model in 16 or 32 bits."""


def target_named(name: str) -> Target:
    """Raises UnknownName, and Unsupported for what is read only."""
    if name in READ_ONLY:
        raise Unsupported(
            f"{name} is read and not written; such weights are written with --to {next(iter(CONTAINERS))}"
        )
    if name not in TARGETS:
        raise UnknownName("container", name, TARGETS)
    return TARGETS[name]


def file_target(path: Path) -> Target | None:
    """The target whose outputs are files that are called so; None where this is a folder's name."""
    return next((target for target in TARGETS.values() if target.file_suffix == path.suffix and path.suffix), None)


def output_path(path: Path) -> OutputPath:
    """Where an output that is called so comes to lie."""
    marks = tuple(dict.fromkeys(mark for target in TARGETS.values() for mark in target.marks))
    return OutputPath(path, is_file(path.resolve()), marks)
