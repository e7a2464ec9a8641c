"""What Transformers, with GPTQModel's kernels, makes of folders: python gptqmodel_reads.py OUT FOLDER...

A process of its own: importing gptqmodel changes torch and Transformers for whoever else uses them.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

found = {}
for folder in sys.argv[2:]:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    sizes = {"bits": config["bits"], "group_size": config["group_size"]}
    # The reference kernels: others are compiled as they are first used, for minutes.
    kernel = (
        AwqConfig(backend="torch_awq", **sizes)
        if config["quant_method"] == "awq"
        else GPTQConfig(backend="gptq_torch", **sizes)
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float16, quantization_config=kernel
    )
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    with torch.no_grad():
        logits = model(torch.arange(5, 69)[None]).logits
        decoded = {
            name: m.dequantize_weight()
            if hasattr(m, "dequantize_weight")
            else m._dequantize_weight_for_inference(logits, dtype=torch.float16)
            for name, m in linears.items()
        }
    found[Path(folder).name] = {"logits": logits, "decoded": {name: w.T for name, w in decoded.items()}}
torch.save(found, sys.argv[1])
