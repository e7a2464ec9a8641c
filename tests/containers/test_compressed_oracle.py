"""The compressed-tensors package and Transformers read our folders to exactly what `decode()` says."""

import json

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import halfbyte
from halfbyte import demo
from halfbyte.models.checkpoint import Checkpoint

INTEGERS = ["int4-g128", "int4-g128-asym", "int3-g64", "int5-g32-asym", "int8-channel", "int2-g128-asym"]
FLOATS = ["fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8-e4m3", "mxfp6-e2m3", "mxfp4", "nvfp4-global"]
TOKENS = torch.arange(5, 69)[None]


@pytest.fixture(scope="module", params=INTEGERS + FLOATS)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("ct") / request.param
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid=request.param, to="compressed-tensors")
    return out


def test_the_package_decompresses_every_module_to_our_decode(folder):
    checkpoint = Checkpoint.open(folder)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert len(checkpoint.quantized) == 42
    for module in checkpoint.quantized:
        tensors = {n.removeprefix(f"{module}."): checkpoint.entries[n].read() for n in checkpoint.parts_of[module]}
        theirs = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(tensors, scheme)["weight"]
        assert torch.equal(theirs, checkpoint.read_quantized(module).decode().to(theirs.dtype))


@pytest.mark.slow
def test_transformers_computes_what_our_decode_computes(folder):
    checkpoint = Checkpoint.open(folder)
    plain = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.bfloat16)
    state = plain.state_dict()
    for module in checkpoint.quantized:
        state[f"{module}.weight"].copy_(checkpoint.read_quantized(module).decode())
    # compressed-tensors 0.20 plans an unpacked zero point for a compressed module and so refuses every packed asymmetric file, its
    # own too; asked to dequantize, it reads them.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if folder.name.endswith("asym") else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        expected, found, ours = (m(TOKENS).logits for m in (plain, theirs, halfbyte.load(folder)))
    assert torch.equal(found, expected)
    assert torch.equal(ours, expected)
