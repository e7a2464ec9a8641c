"""llama.cpp's own library as the judge of what a GGUF means."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")


def load(path: Path, vocabulary_only: bool = False, cache: int = 0):
    """`cache`: what keys and values are kept in, a GGMLQuantizationType; 0 is F32."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = (
        False  # no matrices laid out anew for AMX, whose registers some virtual machines announce and do not give
    )
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", return_value=params):
        return llama_cpp.Llama(
            str(path), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, vocab_only=vocabulary_only,
            logits_all=True, verbose=False,
            type_k=cache, type_v=cache, flash_attn=cache != 0,
        )  # fmt: skip


def logits(path: Path, tokens: list[int], cache: int = 0) -> torch.Tensor:
    """[position, vocabulary]"""
    model = load(path, cache=cache)
    try:
        model.eval(tokens)
        return torch.from_numpy(np.array(model.scores[: len(tokens)]))
    finally:
        model.close()


def tokenize(model, text: str, special: bool = True) -> list[int]:
    return model.tokenize(text.encode(), add_bos=True, special=special)
