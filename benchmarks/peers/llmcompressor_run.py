"""llm-compressor on a checkpoint, with the same calibration tokens. Run it in an environment of its own
(llmcompressor==0.14.0.1).

    python llmcompressor_run.py MODEL OUT METHOD GRID TOKENS.npy

METHOD is rtn or gptq, and smoothquant+ before it; GRID is one of halfbyte's, such as int4-g128-asym or
int8-channel/int8-token.
"""

import sys

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {
    "int8-channel/int8-token": "W8A8",
    "fp8-e4m3-channel/fp8-e4m3-token": "FP8_DYNAMIC",
    "nvfp4/nvfp4": "NVFP4",
}
STRENGTH = 0.8
"""Of smoothing, as in its example for Llama."""


def integers(grid: str) -> dict:
    """Weights such as int4-g128-asym, with inputs in 16 bits or int8-static."""
    words, _, read = grid.partition("/")
    bits, _, span = words.removeprefix("int").partition("-")
    symmetric, span = not span.endswith("-asym"), span.removesuffix("-asym")
    size = {"strategy": "group", "group_size": int(span[1:])} if span.startswith("g") else {"strategy": span}
    group = {"targets": ["Linear"], "weights": {"num_bits": int(bits), "type": "int", "symmetric": symmetric, **size}}
    if read == "int8-static":
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor",
            "dynamic": False,
        }
    return {"config_groups": {"group_0": group}}


source, out, method, grid, tokens = sys.argv[1:6]
model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained(source)
windows = np.load(tokens)
scheme = {"scheme": SCHEMES[grid], "targets": "Linear"} if grid in SCHEMES else integers(grid)
quantizer = GPTQModifier if method.endswith("gptq") else QuantizationModifier
recipe = [SmoothQuantModifier(smoothing_strength=STRENGTH)] if method.startswith("smoothquant") else []
recipe.append(quantizer(ignore=["lm_head"], **scheme))
data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()})
needs_text = method != "rtn" or grid.endswith(("static", "/nvfp4"))
text = (
    {"dataset": data, "max_seq_length": windows.shape[1], "num_calibration_samples": len(windows)} if needs_text else {}
)
oneshot(model=model, tokenizer=tokenizer, recipe=recipe, output_dir=out, **text)
