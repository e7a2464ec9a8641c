"""GPTQModel on a checkpoint, with the same calibration tokens. Run it in an environment of its own
(gptqmodel==7.7.0)."""

import sys

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig

source, out, bits, asym, tokens = sys.argv[1:6]
windows = np.load(tokens)
config = QuantizeConfig(bits=int(bits), group_size=128, sym=asym != "asym", desc_act=False)
model = GPTQModel.load(source, config)
model.quantize([{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
model.save(out)
