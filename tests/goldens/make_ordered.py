"""Makes folders/ct-actorder: what compressed-tensors wrote and read of columns in activation order, before 0.20.

Run it with a version that has it, in an environment of its own (`pip install compressed-tensors==0.12.2`):

    python tests/goldens/make_ordered.py
"""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent / "folders"
NAME, LIKE, MODULE = "ct-actorder", "ct-int4-g32", "model.layers.0.mlp.down_proj"
OUT, WIDTH, GROUP = 64, 128, 32

torch.manual_seed(0)
args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True, actorder="group")
w = (torch.randn(OUT, WIDTH) * torch.rand(WIDTH).exp()).bfloat16()
order = torch.randperm(WIDTH)
g_idx = torch.empty(WIDTH, dtype=torch.int32)
g_idx[order] = torch.arange(WIDTH, dtype=torch.int32) // GROUP
grouped = w[:, order].view(OUT, -1, GROUP)
scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
scale = scale.bfloat16()

compressor = PackedQuantizationCompressor()
written = compressor.compress_weight(w, scale, args, zero_point=zero, g_idx=g_idx)
written |= {"weight_scale": scale, "weight_g_idx": g_idx}
decoded = compressor.decompress_weight({**written}, args)
config = json.loads((HERE / LIKE / "config.json").read_text())
config["quantization_config"] = {
    "quant_method": "compressed-tensors",
    **QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": args.model_dump()}},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json", exclude={"quant_method"}),
}

shutil.rmtree(HERE / NAME, ignore_errors=True)
(HERE / NAME).mkdir()
(HERE / NAME / "config.json").write_text(json.dumps(config, indent=1) + "\n")
save_file({f"{MODULE}.{n}": t.contiguous() for n, t in written.items()}, HERE / NAME / "model.safetensors")
save_file({"decoded": decoded[::4].contiguous()}, HERE / NAME / "expected")
