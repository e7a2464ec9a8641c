"""Presets give every tensor the type that llama-quantize gives it."""

import ctypes
import re
from pathlib import Path

import pytest

from halfbyte import pipeline
from halfbyte.errors import UnknownName
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.targets.gguf import presets
from halfbyte.targets.gguf.writer import GGUFWriter
from tiny import make

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "llama whose keys serve four heads": {**SMALL, "num_key_value_heads": 1},
    "llama with a tied head": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama with rows of no 256": {**SMALL, "hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 5,
    "intermediate_size": 96},
    "mixtral of eight": {**SMALL, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
    "num_key_value_heads": 2, "num_local_experts": 8},
}  # fmt: skip
QUANTIZED = [name for name in presets.PRESETS if name not in presets.PLAIN]


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory) -> tuple[Path, Path]:
    """The checkpoint, and a BF16 GGUF of it."""
    home = tmp_path_factory.mktemp("preset")
    model = make(home / "model", **MODELS[request.param])
    pipeline.quantize(Recipe(model=str(model), grid="BF16", to="gguf", method="nearest"), home / "whole.gguf")
    return model, home / "whole.gguf"


@pytest.fixture(scope="module")
def log():
    """What llama.cpp says."""
    said: list[str] = []
    listen = llama.llama_log_callback(lambda level, text, _: said.append(text.decode()))
    llama.llama_log_set(listen, ctypes.c_void_p(0))
    yield said
    llama.llama_log_set(llama.llama_log_callback(), ctypes.c_void_p(0))


def llama_quantize(whole: Path, preset: str, imatrix: bool, log: list[str]) -> dict[str, str]:
    """The types that a dry run announces."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = presets.PRESETS[preset].number, 1, True
    rows = (llama.llama_model_imatrix_data * 2)()  # one entry, of no weight of the model, and the end of the list
    rows[0].name, rows[0].data, rows[0].size = b"none", (ctypes.c_float * 1)(1), 1
    params.imatrix = rows if imatrix else None
    log.clear()
    assert (
        llama.llama_model_quantize(
            str(whole).encode(), str(whole.with_name("not-written.gguf")).encode(), ctypes.byref(params)
        )
        == 0
    )
    lines = re.findall(r"\] (\S+) +- \[.*?\], type = +(\w+), size = .*?MiB(?: -> .*?\((\w+)\))?\n", "".join(log))
    return {name: (then or now).upper() for name, now, then in lines}


@pytest.mark.parametrize("preset", QUANTIZED)
@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
def test_types_are_llama_quantizes(source, preset, imatrix, log):
    model, whole = source
    writer = GGUFWriter(resolve(Recipe(model=str(model), grid=preset, method="imatrix" if imatrix else "nearest")))
    ours = {
        name: "F16" if kind == "BF16" else kind for name, (kind, _) in writer.types.items()
    }  # where no type fits: as wide as the source
    assert ours == llama_quantize(whole, preset, imatrix, log)


def test_names_are_read_as_llama_quantize_reads_them():
    assert [presets.preset_named(name) for name in ("q4_k_m", "Q4_K", "Q5_K", "iq4_xs")] == [
        "Q4_K_M",
        "Q4_K_M",
        "Q5_K_M",
        "IQ4_XS",
    ]
    with pytest.raises(UnknownName, match="Q4_K_M"):
        presets.preset_named("Q4_K_X")
