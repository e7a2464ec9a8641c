"""The compressed-tensors package and Transformers read our folders to exactly what `decode()` says."""

import json

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import halfbyte
from halfbyte import demo
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.safetensors import read_header
from halfbyte.models.checkpoint import Checkpoint

INTEGERS = ["int4-g128", "int4-g128-asym", "int3-g64", "int5-g32-asym", "int8-channel", "int2-g128-asym"]
FLOATS = ["fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8-e4m3", "mxfp6-e2m3", "mxfp4", "nvfp4"]
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
    # compressed-tensors 0.20 plans an unpacked zero point for a compressed module and so refuses every packed
    # asymmetric file, its own too; asked to dequantize, it reads them.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if folder.name.endswith("asym") else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        expected, found, ours = (m(TOKENS).logits for m in (plain, theirs, halfbyte.load(folder)))
    assert torch.equal(found, expected)
    assert torch.equal(ours, expected)


def compressed(
    out: int, width: int, kind: str, format: str, **weights
) -> tuple[dict[str, torch.Tensor], QuantizationScheme]:
    """A matrix as compressed-tensors scales, rounds and lays it out by itself."""
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * 0.05
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type=kind, **weights), format=format)
    size = weights.get("group_size") or width
    low, high = (
        (w.amin(), w.amax())
        if scheme.weights.strategy == "tensor"
        else (f(w.unflatten(1, (-1, size)), -1) for f in (torch.amin, torch.amax))
    )
    state = {"weight": w}
    if scheme.weights.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
    state["weight_scale"], zero = calculate_qparams(
        low, high, scheme.weights, global_scale=state.get("weight_global_scale")
    )
    state["weight_scale"] = (
        state["weight_scale"].bfloat16() if weights.get("scale_dtype") is None else state["weight_scale"]
    )
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero
    return BaseCompressor.get_value_from_registry(format).compress(state, scheme), scheme


THEIRS = {
    "fp8-e4m3-tensor-bf16": ("float", "float-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8-e4m3-channel-bf16": ("float", "naive-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-channel-bf16": ("int", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-channel-asym-bf16": ("int", "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8-tensor-bf16": ("int", "int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8-g32-bf16": ("int", "int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "mxfp8-e4m3": (
        "float",
        "mxfp8-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "mxfp6-e2m3": (
        "float",
        "mxfp6-pack-quantized",
        {"num_bits": 6, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "mxfp4": (
        "float",
        "mxfp4-pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "float",
        "nvfp4-pack-quantized",
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_the_package_wrote_is_read_as_it_reads_it(name, tmp_path):
    kind, format, arguments = THEIRS[name]
    tensors, scheme = compressed(64, 128, kind, format, **arguments)
    save_file({f"a.{n}": t.contiguous() for n, t in tensors.items()}, tmp_path / "x.safetensors")
    container, entries = CompressedTensors(), read_header(tmp_path / "x.safetensors")
    config = {"format": format, "config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    found = container.find(config, entries)
    assert {module: str(grid) for module, (grid, _) in found.items()} == {"a": name}
    q = container.unpack({n.removeprefix("a."): e.read() for n, e in entries.items()}, *found["a"])
    theirs = BaseCompressor.get_value_from_registry(format).decompress(tensors, scheme)["weight"]
    assert torch.equal(q.decode().to(theirs.dtype), theirs)


def test_several_formats_in_one_checkpoint_are_said_per_group(tmp_path):
    override = {"*.down_proj": "fp8-e4m3-channel", "*.o_proj": "mxfp4"}
    halfbyte.quantize(
        demo.MODEL, tmp_path / "out", method="minmax", grid="int4-g128", to="compressed-tensors", override=override
    )
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    assert config.format == "mixed-precision"
    assert {g.format for g in config.config_groups.values()} == {
        "pack-quantized",
        "naive-quantized",
        "mxfp4-pack-quantized",
    }
    assert {str(grid) for grid, _ in Checkpoint.open(tmp_path / "out").quantized.values()} == {
        "int4-g128-bf16",
        "fp8-e4m3-channel-bf16",
        "mxfp4",
    }
