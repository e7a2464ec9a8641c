"""Makes folders/: checkpoints that GPTQModel and compressed-tensors wrote, and the weights that they themselves read
from them.

Run it where both are installed (tests/requirements-oracles.txt):

    TORCHDYNAMO_DISABLE=1 GPTQMODEL_CPU_WORKERS=2 python tests/goldens/make_folders.py

The model has one layer; of its matrices down_proj (64 x 128) is kept, and of what it decodes to every fourth row.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent / "folders"
MODULE = "model.layers.0.mlp.down_proj"
GPTQMODEL = {
    "gptq-v1": {"bits": 4, "sym": True, "desc_act": False},
    "gptq-v1-asym": {"bits": 4, "sym": False, "desc_act": False},
    "gptq-v1-int3-asym": {"bits": 3, "sym": False, "desc_act": False},
    "gptq-v2-asym": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "gptq-desc-act": {"bits": 4, "sym": True, "desc_act": True, "act_group_aware": False},
    "awq-gemm": {"bits": 4, "sym": False, "method": "awq", "format": "gemm"},
}
COMPRESSED = {
    "ct-int4-g32": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    "ct-int3-g64-asym": {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": False},
    "ct-int8-channel": {"num_bits": 8, "strategy": "channel", "symmetric": True},
}


def source(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    )
    model.get_parameter(f"{MODULE}.weight").data[:8].abs_()  # rows of one sign have the zero point 0
    model.bfloat16().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32)}, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t0", eos_token="t1", pad_token="t2"
    ).save_pretrained(folder)
    return folder


def keep(folder: Path, name: str, decoded: torch.Tensor) -> None:
    """What the test needs of a folder."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    (HERE / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {n: t.contiguous() for n, t in load_file(folder / "model.safetensors").items() if n.startswith(MODULE)}
    save_file(tensors, HERE / name / "model.safetensors")
    save_file({"decoded": decoded[::4].contiguous()}, HERE / name / "expected")


def gptqmodel(scratch: Path, origin: Path, name: str, settings: dict) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [
        {"input_ids": torch.randint(0, 32, (64,), generator=generator).tolist(), "attention_mask": [1] * 64}
        for _ in range(64)
    ]
    model = GPTQModel.load(str(origin), QuantizeConfig(group_size=32, **settings), device="cpu", dtype=torch.bfloat16)
    model.quantize(texts, batch_size=8)
    model.save(str(scratch / name))
    backend = BACKEND.AWQ_TORCH if name.startswith("awq") else BACKEND.GPTQ_TORCH
    linear = GPTQModel.load(
        str(scratch / name), backend=backend, device="cpu", dtype=torch.float16
    ).model.get_submodule(MODULE)
    if name.startswith("awq"):
        decoded = linear._dequantize_weight_for_inference(torch.zeros(1, dtype=torch.float16), dtype=torch.float16)
    else:
        decoded = linear.dequantize_weight()
    keep(scratch / name, name, decoded.detach().T)


def compressed(scratch: Path, origin: Path, name: str, settings: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.bfloat16)
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **settings}}},
            "ignore": ["lm_head"],
            "format": "pack-quantized",
        }
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            w = module.weight.view(module.weight.shape[0], -1, settings.get("group_size", module.weight.shape[1]))
            scale, zero = calculate_qparams(w.amin(-1), w.amax(-1), scheme.weights)
            module.weight_scale.data, module.weight_zero_point.data = scale.to(torch.bfloat16), zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(scratch / name)
    compressor.update_config(str(scratch / name))
    read = AutoModelForCausalLM.from_pretrained(
        scratch / name, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    keep(scratch / name, name, read.get_parameter(f"{MODULE}.weight").detach())


with tempfile.TemporaryDirectory() as folder:
    scratch = Path(folder)
    origin = source(scratch / "source")
    for name, settings in COMPRESSED.items():
        compressed(scratch, origin, name, settings)
    for name, settings in GPTQMODEL.items():
        gptqmodel(scratch, origin, name, settings)
