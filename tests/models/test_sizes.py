"""Matrices that are whole and not of the model: half of the rows, with half of the scales."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.errors import BadCheckpoint
from halfbyte.models import sizes
from halfbyte.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sizes")
    tiny.make(home / "model")
    halfbyte.quantize(home / "model", home / "int4", method="nearest", grid="int4-g32")
    halfbyte.quantize(home / "model", home / "int8", method="nearest", grid="int8-channel")
    return home


def halved(source: Path, folder: Path, module: str, layers: tuple[int, ...]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [
        name for name in tensors if any(name.startswith(f"model.layers.{layer}.{module}.") for layer in layers)
    ]:
        if name.endswith("weight_shape"):
            tensors[name][0] //= 2
        else:
            tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("module", "layers"), [("self_attn.q_proj", (1,)), ("mlp.up_proj", (0,)), ("mlp.down_proj", (0, 1))]
)
@pytest.mark.parametrize("source", ["model", "int4", "int8"])
def test_half_a_matrix_is_refused_by_methods_without_a_model(home, source, module, layers, tmp_path):
    folder = halved(home / source, tmp_path / "model", module, layers)
    commands = [["quantize", "--method", "nearest", *([] if source == "model" else ["--requantize"])]]
    commands += [] if source == "model" else [["convert", "--to", "gptq"], ["dequantize"]]
    for command, *options in commands:
        tiny.refused(
            tiny.halfbyte(command, folder, "-o", tmp_path / "out", *options), f"{module}.weight", "LlamaForCausalLM"
        )


def test_of_a_model_that_transformers_does_not_know_nothing_is_said(home, tmp_path):
    folder = halved(home / "model", tmp_path / "model", "mlp.up_proj", (1,))
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.mlp\.up_proj"):
        sizes.require(Checkpoint.open(folder))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"of-its-own"').replace("Llama", "OfItsOwn"))
    sizes.require(Checkpoint.open(folder))
