"""bitsandbytes' own quantizer on a checkpoint, through Transformers, as its users make such files.

python bitsandbytes_run.py MODEL OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, out = sys.argv[1:3]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config).save_pretrained(out)
