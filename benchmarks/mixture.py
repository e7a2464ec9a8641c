"""A mixture of 256 experts in each of 58 layers, as DeepSeek-V3 is (45,000 tensors), whose files have headers and holes
in the place of weights; and how long it takes to be planned.

python benchmarks/mixture.py /tmp/mixture
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

from measure import machine

from halfbyte import demo

LAYERS, DENSE, EXPERTS, HIDDEN, INNER, OUTER, HEADS = 61, 3, 256, 7168, 2048, 18432, 128
VOCABULARY = 129280
PER_FILE = 300
"""Tensors of a file."""
COMMANDS = (
    ("plan",),
    ("plan", "--device", "h100-sxm", "--cards", "8", "--engine", "vllm"),
    ("quantize", "--dry-run", "--grid", "int4-g128", "--engine", "vllm"),
    ("quantize", "--dry-run", "--grid", "fp8-block", "--method", "nearest"),
    ("quantize", "--dry-run", "--grid", "Q4_K_M", "--to", "gguf"),
)


def config(layers: int = LAYERS, experts: int = EXPERTS) -> dict:
    """As its config.json has it, without the numbers that have no shape."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": OUTER, "moe_intermediate_size": INNER, "num_hidden_layers": layers,
        "first_k_dense_replace": DENSE, "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "vocab_size": VOCABULARY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "moe_layer_freq": 1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def shapes(layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, tuple[int, ...]]:
    """Of every tensor."""
    block = {
        "self_attn.q_a_proj": (1536, HIDDEN), "self_attn.q_b_proj": (HEADS * 192, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, HIDDEN), "self_attn.kv_b_proj": (HEADS * 256, 512),
        "self_attn.o_proj": (HIDDEN, HEADS * 128), "self_attn.q_a_layernorm": (1536,),
        "self_attn.kv_a_layernorm": (512,), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip

    def mlp(home: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{home}.gate_proj": (inner, HIDDEN),
            f"{home}.up_proj": (inner, HIDDEN),
            f"{home}.down_proj": (HIDDEN, inner),
        }

    routed = {"mlp.gate": (experts, HIDDEN), **mlp("mlp.shared_experts", INNER)}
    routed |= {name: shape for e in range(experts) for name, shape in mlp(f"mlp.experts.{e}", INNER).items()}
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        own = block | (mlp("mlp", OUTER) if layer < DENSE else routed)
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        if layer >= DENSE:
            found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, layers: int = LAYERS, experts: int = EXPERTS) -> Path:
    """The checkpoint; the tokenizer is the embedded model's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers, experts), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo.MODEL / name, folder / name)
    tensors = list(shapes(layers, experts).items())
    parts = [dict(tensors[first : first + PER_FILE]) for first in range(0, len(tensors), PER_FILE)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_holes(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_holes(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A file whose bytes of weights take no disk: BF16, all 0."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    words = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    folder = parser.parse_args().folder
    if not folder.exists():
        make(folder, parser.parse_args().layers)
    print(f"{machine()}; {os.environ.get('OMP_NUM_THREADS', 'all')} threads; {len(shapes())} tensors\n")
    print("| command | seconds |")
    print("|---|---:|")
    for name, *words in COMMANDS:
        out = ["-o", f"{folder}-out{'.gguf' if 'gguf' in words else ''}"] if name == "quantize" else []
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "halfbyte", name, str(folder), *words, *out],
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        print(f"| {' '.join((name, *words))} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
