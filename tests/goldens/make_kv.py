"""Makes llm_compressor_kv/: names, shapes and config of the scales that llm-compressor writes for a KV cache.

Run it where llmcompressor is installed (it was made with 0.14.0.1):

    python tests/goldens/make_kv.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODEL = HERE.parent.parent / "src" / "halfbyte" / "demo" / "model"
STRATEGIES = {"fp8-e4m3": "tensor", "fp8-e4m3-head": "attn_head"}

for name, strategy in STRATEGIES.items():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = torch.randint(2, model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0)).tolist()
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    windows = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens])
    oneshot(
        model=model,
        dataset=windows,
        recipe=QuantizationModifier(kv_cache_scheme=scheme),
        max_seq_length=256,
        num_calibration_samples=4,
    )
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        scales = {
            key: value for key, value in load_file(Path(folder) / "model.safetensors").items() if key.endswith("_scale")
        }
    save_file(scales, HERE / "llm_compressor_kv" / f"{name}.safetensors")
    (HERE / "llm_compressor_kv" / f"{name}.json").write_text(
        json.dumps({"quantization_config": config}, indent=2) + "\n"
    )
