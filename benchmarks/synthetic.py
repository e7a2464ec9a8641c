"""A Llama of 1.04 billion random weights (or a cut of fewer layers), written as a checkpoint: the size to time things
with.

python benchmarks/synthetic.py /tmp/llama-1b --layers 16
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from halfbyte import demo
from halfbyte.containers.safetensors import SafetensorsFileWriter, Spec

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD, VOCABULARY = 2048, 8192, 32, 8, 64, 32768


def make(folder: Path, layers: int = 16) -> Path:
    """Normal weights with outlier channels in the norms; the tokenizer is the embedded model's."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((demo.MODEL / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo.MODEL / name, folder / name)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        block = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,
            ),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    writer = SafetensorsFileWriter(
        folder / "model.safetensors", {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    )
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        spread = 0.02 if len(shape) == 2 else 0.3
        values = torch.randn(shape, generator=generator) * spread + (1.0 if len(shape) == 1 else 0.0)
        writer.write(name, values.to(torch.bfloat16))
    writer.close()
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    print(make(arguments.folder, arguments.layers))
