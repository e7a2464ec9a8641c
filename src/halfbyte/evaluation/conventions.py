"""How a text becomes scored positions. Perplexities of one model differ by half between conventions, so each has a name."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from halfbyte.errors import UnknownName


@dataclass(frozen=True)
class Convention:
    """Windows do not overlap; positions from `skip * length` on are scored, each predicting the next token."""

    name: str
    skip: float
    bos: bool
    """Whether the first token of each window is overwritten by BOS, where the model's tokenizer adds one."""
    about: str

    def first(self, length: int) -> int:
        return int(length * self.skip)

    def prepare(self, windows: Int64[Tensor, "windows length"], bos: int | None) -> Int64[Tensor, "windows length"]:
        if self.bos and bos is not None:
            windows = windows.clone()
            windows[:, 0] = bos
        return windows


CONVENTIONS = {
    "papers": Convention("papers", 0.0, False, "non-overlapping windows, every position scored (GPTQ, AWQ and later papers)"),
    "llama.cpp": Convention("llama.cpp", 0.5, True, "llama-perplexity: the second half of each window scored, BOS first if the tokenizer adds it"),
}


def convention_named(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise UnknownName("convention", name, CONVENTIONS)
    return CONVENTIONS[name]
