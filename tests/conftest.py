"""Shapes in signatures are checked while tests run; `--few` is for the inner loop."""

import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels for GPUs run on CPU tensors

# Module by module: the checks wrap every function, which costs a call three times what it computes, and those of
# kernels/cpu and kernels/gpu are compiled. Modules without shapes have nothing to check that pyright does not.
SOURCE = Path(__file__).parent.parent / "src"
FILES = [
    path
    for part in (
        "kernels",
        "grids",
        "solvers",
        "models",
        "transforms",
        "containers",
        "targets",
        "evaluation",
        "inference",
    )
    for path in (SOURCE / "halfbyte" / part).rglob("*.py")
] + [SOURCE / "halfbyte" / "nn.py"]
CHECKED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in FILES
    if path.parent.name not in ("cpu", "gpu") and "jaxtyping" in path.read_text(encoding="utf-8")
]
install_import_hook(CHECKED, "beartype.beartype")
LONG = 100_000
"""Characters."""


class Remembering:
    """A tokenizer that looks up what it has made of a long text: hundreds of tests read the embedded ones, each of
    which takes up to a second."""

    made: ClassVar[dict[tuple[str, ...], Any]] = {}

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **how: Any) -> Any:
        if len(text) < LONG or not self._tokenizer.is_fast:
            return self._tokenizer(text, **how)
        key = (self._tokenizer.backend_tokenizer.to_str(), text, str(sorted(how.items())))
        if key not in self.made:
            self.made[key] = self._tokenizer(text, **how)
        return self.made[key]


@pytest.fixture(autouse=True, scope="session")
def texts_are_made_into_tokens_once():
    from halfbyte.models import calibrate

    stream = calibrate._stream
    calibrate._stream = lambda checkpoint, tokenizer, records: stream(checkpoint, Remembering(tokenizer), records)
    yield
    calibrate._stream = stream


def pytest_addoption(parser):
    parser.addoption("--few", type=int, metavar="N", help="of each test at most N of its parameters, spread evenly")


@pytest.hookimpl(trylast=True)  # of those that markers leave
def pytest_collection_modifyitems(config, items):
    if (most := config.getoption("few")) is None:
        return
    tests: dict[str, list] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {item for same in tests.values() for item in same[:: -(-len(same) // most)]}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
