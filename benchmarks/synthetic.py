"""A Llama of 1.04 billion random weights, one of 8.03 billion, or a cut of fewer layers, written as a checkpoint: the
sizes to time things with.

python benchmarks/synthetic.py /tmp/llama-1b
python benchmarks/synthetic.py /tmp/llama-8b --size 8b --layers 2
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from halfbyte import demo
from halfbyte.containers.safetensors import SafetensorsFileWriter, Spec


class Size(NamedTuple):
    """Of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    layers: int
    tied: bool
    """Whether the head is the embedding."""


SIZES = {"1b": Size(2048, 8192, 32, 8, 64, 32768, 16, True), "8b": Size(4096, 14336, 32, 8, 128, 128256, 32, False)}
"""The second has the shapes of Llama-3.1-8B."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(folder: Path, layers: int | None = None, size: Size = SIZES["1b"]) -> Path:
    """Normal weights with outlier channels in the norms; the tokenizer is the embedded model's."""
    layers = layers or size.layers
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((demo.MODEL / "config.json").read_text())
    config |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head,
        "num_hidden_layers": layers,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": size.tied,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo.MODEL / name, folder / name)
    read, read_kv = size.heads * size.head, size.kv_heads * size.head
    block = {
        "self_attn.q_proj": (read, size.hidden),
        "self_attn.k_proj": (read_kv, size.hidden),
        "self_attn.v_proj": (read_kv, size.hidden),
        "self_attn.o_proj": (size.hidden, read),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
        "input_layernorm": (size.hidden,),
        "post_attention_layernorm": (size.hidden,),
    }
    shapes = {"model.embed_tokens.weight": (size.vocabulary, size.hidden), "model.norm.weight": (size.hidden,)}
    if not size.tied:
        shapes["lm_head.weight"] = (size.vocabulary, size.hidden)
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    writer = SafetensorsFileWriter(
        folder / "model.safetensors", {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, shape in shapes.items():
        spread = 0.02 if len(shape) == 2 else 0.3
        values = torch.randn(shape, generator=generator, device=DEVICE) * spread + (1.0 if len(shape) == 1 else 0.0)
        writer.write(name, values.to(torch.bfloat16).cpu())
    writer.close()
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", choices=SIZES, default="1b")
    arguments = parser.parse_args()
    print(make(arguments.folder, arguments.layers, SIZES[arguments.size]))
