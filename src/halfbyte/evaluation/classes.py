"""Kinds of tokens: an average over a text hides that numbers, say, lose ten times what words do."""

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

Class = Callable[[str], bool]
LATIN = "LATIN"


def _script(text: str) -> str:
    """Of its first letter, as Unicode calls it; nothing where there is none."""
    letter = next((c for c in text if c.isalpha()), "")
    return unicodedata.name(letter, "").partition(" ")[0] if letter else ""


CLASSES: Mapping[str, Class] = {
    "numbers": lambda text: any(c.isdigit() for c in text),
    "other scripts than Latin": lambda text: _script(text) not in ("", LATIN),
    "letters with accents": lambda text: any(c.isalpha() and ord(c) > 127 for c in text),
    "words after a space": lambda text: text[:1].isspace() and text.strip().isalpha(),
    "parts of words": lambda text: text.isalpha(),
    "marks of code": lambda text: any(c in "{}[]()<>=+*/\\|&^%$#@_`~" for c in text),
    "white space": lambda text: bool(text) and text.isspace(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
}
"""The first that fits is a token's; what fits none is of no class."""


def of(tokenizer: Any, tokens: Int64[Tensor, "windows positions"]) -> Int64[Tensor, "windows positions"]:
    """The class of each token, as a place in CLASSES; one more for none."""
    kinds, which = tokens.unique(return_inverse=True)
    classes = [_class(tokenizer.decode([token], skip_special_tokens=False)) for token in kinds.tolist()]
    return torch.tensor(classes)[which]


def _class(text: str) -> int:
    return next((n for n, fits in enumerate(CLASSES.values()) if fits(text)), len(CLASSES))
