"""llama.cpp's own encoder, from the library in the wheel of llama-cpp-python."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch


def encode(name: str, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Weights as they come back from llama.cpp's type `name`."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        pytest.skip("llama-cpp-python is not installed, so there is no encoder of llama.cpp to compare with")
    library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    kind = gguf.GGMLQuantizationType[name.upper()]
    library.ggml_quantize_init(kind.value)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    source, raw = np.ascontiguousarray(w.float().numpy()), np.zeros((w.shape[0], w.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy())
    library.ggml_quantize_chunk(
        kind.value, source.ctypes.data, raw.ctypes.data, 0, *w.shape, None if weights is None else weights.ctypes.data
    )
    return torch.from_numpy(gguf.dequantize(raw, kind))
