"""llm-compressor on a checkpoint, with the same calibration tokens. Run it in an environment of its own (llmcompressor==0.14.0.1)."""

import sys

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out, method, bits, asym, tokens = sys.argv[1:7]
model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained(source)
windows = np.load(tokens)
weights = {"num_bits": int(bits), "type": "int", "symmetric": asym != "asym", "strategy": "group", "group_size": 128}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
common = {"ignore": ["lm_head"], "config_groups": groups}
if method == "rtn":
    oneshot(model=model, tokenizer=tokenizer, recipe=QuantizationModifier(**common), output_dir=out)
else:
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()})
    oneshot(
        model=model, tokenizer=tokenizer, recipe=GPTQModifier(**common), dataset=data, output_dir=out,
        max_seq_length=windows.shape[1], num_calibration_samples=len(windows),
    )  # fmt: skip
