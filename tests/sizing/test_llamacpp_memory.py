"""Caches and buffers that llama.cpp allocates here, from its own log."""

import ctypes
import re

import pytest

import halfbyte
import tiny
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.sizing.accounting import accounting_of
from halfbyte.sizing.cache import TYPES, ModelConfig, cache_bytes, layers_of

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")
GGML_TYPES = {"16 bits": 1, "q8_0": 8, "q4_0": 2}
MIB = 1 << 20


def log_of(path, context: int, kind: str) -> str:
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(_level, text, _user):
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    number = GGML_TYPES[kind]
    llama_cpp.Llama(str(path), n_ctx=context, type_k=number, type_v=number, flash_attn=True, verbose=True).close()
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))  # one that is freed would be called on
    return "".join(lines)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    source = tiny.make(folder / "model", hidden_size=256, intermediate_size=512, num_attention_heads=8,
                       num_key_value_heads=4, max_position_embeddings=8192)  # fmt: skip
    halfbyte.quantize(source, folder / "m.gguf", method="nearest", grid="Q8_0")
    return folder / "m.gguf"


@pytest.mark.parametrize(("context", "kind"), [(300, "16 bits"), (4096, "16 bits"), (4096, "q8_0"), (2048, "q4_0")])
def test_cache(gguf, context, kind):
    log = log_of(gguf, context, kind)
    allocated = sum(float(mib) for mib in re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log))
    layers = layers_of(Checkpoint.open(gguf).config)
    planned = cache_bytes(layers, context, 1, TYPES[kind], accounting_of("llama.cpp").paging(0))
    assert planned / MIB == pytest.approx(allocated, abs=0.01)


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "context", "measured"),
    [(576, 49152, 2048, 99.38), (640, 262144, 4096, 514.50), (640, 262144, 32768, 514.50)],
    ids=["SmolLM2-135M", "gemma-3-270m", "gemma-3-270m-32768"],
)
def test_compute_buffers(hidden, vocabulary, context, measured):
    """MiB in the log of llama.cpp as llama-cpp-python 0.3.36 has it, on a CPU."""
    s = ModelConfig({"model_type": "", "hidden_size": hidden, "vocab_size": vocabulary})
    planned = accounting_of("llama.cpp").activations(s, 0, 1, context, 1)
    assert planned / MIB == pytest.approx(measured, rel=0.1)


def test_windows_are_padded_as_llama_cpp_pads_them():
    """unslothai/unsloth pull request 7530: 1024 tokens in 3 sequences are 1536 cells of Gemma 3 270M, 27.0 MiB."""
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    }
    paging = accounting_of("llama.cpp").paging(0)
    assert cache_bytes(layers_of(config), 1024 // 3, 3, TYPES["16 bits"], paging) / MIB == 27.0
