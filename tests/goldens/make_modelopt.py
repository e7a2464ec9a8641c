"""Makes folders/modelopt-*: checkpoints that NVIDIA's Model Optimizer exported, and the weights that it reads from them
itself.

    python -m venv modelopt
    modelopt/bin/pip install torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.23.0 accelerate requests datasets
    modelopt/bin/python tests/goldens/make_modelopt.py

The model has one layer; of its matrices k_proj (64 x 64) and down_proj (64 x 256) are kept, of what these decode to
every fourth row, and some inputs of down_proj, which it rounds.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "folders"
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CONFIGS = {
    "modelopt-fp8": mtq.update_quant_cfg_with_kv_cache_quant(
        copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]
    ),
    "modelopt-fp8-channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "modelopt-fp8-block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "modelopt-mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "modelopt-nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "modelopt-nvfp4-weights": mtq.W4A16_NVFP4_CFG,
}


def source() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(
        LlamaConfig(
            **sizes, **ids, max_position_embeddings=128, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]
        )
    ).bfloat16()


def decoded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What Model Optimizer makes of a module's tensors, in fp32."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        read = NVFP4QTensor(shape, torch.float32, weight)
        return read.dequantize(torch.float32, scale=scale, double_scale=tensors["weight_scale_2"], block_sizes={-1: 16})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    read = FP8QTensor(weight.shape, torch.float32, weight)
    if scale.dim() == 4:  # [out / 128, 1, in / 128, 1]
        return read.dequantize(torch.float32, scale=scale[:, 0, :, 0], block_sizes={-1: 128, -2: 128})
    return read.dequantize(torch.float32, scale=scale[:, None] if scale.dim() else scale)


def make(name: str, config: dict, scratch: Path) -> None:
    model = mtq.quantize(source(), config, lambda m: m(torch.arange(32)[None]))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) * 0.01
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(scratch / name))
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir(parents=True)
    for file in ("config.json", "hf_quant_config.json"):
        content = json.loads((scratch / name / file).read_text())
        (HERE / name / file).write_text(json.dumps(content, indent=1) + "\n")
    tensors = {
        n: t.contiguous() for n, t in load_file(scratch / name / "model.safetensors").items() if n.startswith(MODULES)
    }
    save_file(tensors, HERE / name / "model.safetensors")
    parts = {m: {n.removeprefix(f"{m}."): t for n, t in tensors.items() if n.startswith(m)} for m in MODULES}
    expected = {m: decoded(p)[::4].contiguous() for m, p in parts.items()}
    if name == "modelopt-nvfp4":  # the quantizer's own kernel for this needs a GPU
        read, scale, factor = NVFP4QTensor.quantize(
            x.clone(), 16, weights_scaling_factor_2=parts[MODULES[1]]["input_scale"]
        )
        rounded = read.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
        expected |= {"inputs": x, "rounded": rounded}
    elif name.startswith("modelopt-fp8"):
        expected |= {"inputs": x, "rounded": model.get_submodule(MODULES[1]).input_quantizer(x[None])[0].clone()}
    save_file(expected, HERE / name / "expected")


with tempfile.TemporaryDirectory() as folder:
    for name, config in CONFIGS.items():
        make(name, config, Path(folder))
