"""Shapes in signatures are checked while tests run."""

from pathlib import Path

from jaxtyping import install_import_hook

# Module by module: the checks wrap functions, and those of kernels/cpu are compiled.
SOURCE = Path(__file__).parent.parent / "src"
FILES = [
    path
    for part in ("kernels", "grids", "solvers", "models", "transforms", "containers", "targets", "evaluation")
    for path in (SOURCE / "halfbyte" / part).rglob("*.py")
] + [SOURCE / "halfbyte" / "nn.py"]
CHECKED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in FILES
    if not path.stem.endswith("_numba") and path.parent.name != "cpu"
]
install_import_hook(CHECKED, "beartype.beartype")
