"""What the cases of `same_bytes.py` read: checkpoints and texts, the same bytes whichever revision reads them.

Run as `python benchmarks/bytes/inputs.py FOLDER` with tests/ among Python's paths. `--golden`: no more than what the
cases without calibration read.
"""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

import tiny
from models.families import FAMILIES

REPOSITORY = Path(__file__).parents[2]

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Rows that every type of ggml divides."""
TARGETS = ("q_proj", "v_proj", "down_proj")


def make_golden(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "src/halfbyte/demo/model", folder / "demo")
    first_block(folder / "demo", folder / "block")
    imatrix(folder / "demo", folder / "imatrix.gguf")


def make_others(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "tests/goldens/folders", folder / "goldens")
    tiny.text(folder / "text.txt")
    tiny.make(folder / "small", **SMALL)
    tiny.make(folder / "chat", chat=True, adds_bos=True, **SMALL)
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        cast(folder / "small", folder / f"small-{name}", dtype)
    adapter(folder / "small", folder / "adapter")
    for name, family in FAMILIES.items():
        family.save(folder / "families" / name)
    told = [[("user", "the quick brown fox"), ("assistant", f"jumps {n} times")] for n in range(40)]
    chats = [{"messages": [{"role": role, "content": words} for role, words in chat]} for chat in told]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    calibration = {"source": "text.txt", "samples": 2, "length": 32}
    recipe = {"model": "small", "method": "awq", "grid": "int4-g64-asym", "to": "awq", "calibration": calibration}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def first_block(model: Path, folder: Path) -> None:
    """A model of which all but the first block is cut off."""
    shutil.copytree(model, folder)
    tensors = {n: t for n, t in load_file(model / "model.safetensors").items() if ".layers." not in n or ".0." in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, num_hidden_layers=1)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cast(source: Path, folder: Path, dtype: torch.dtype) -> None:
    shutil.copytree(source, folder)
    tensors = {name: t.to(dtype) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, dtype=str(dtype).removeprefix("torch."))


def adapter(model: Path, folder: Path, rank: int = 4) -> None:
    """A LoRA adapter as peft lays it out."""
    folder.mkdir()
    generator, found = torch.Generator().manual_seed(3), {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            out, width = weight.shape
            found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.1
            found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8}
    config |= {"target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def imatrix(model: Path, path: Path) -> None:
    """An importance matrix of random values in llama.cpp's format, by its own writer."""
    config = json.loads((model / "config.json").read_text())
    widths: dict[str, int] = {}
    widths |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), config["hidden_size"])
    widths["attn_output"] = config["num_attention_heads"] * config["head_dim"]
    widths["ffn_down"] = config["intermediate_size"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            sums = (random.lognormal(sigma=1.5, size=(1, width)) * 512).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer}.{name}.weight.counts", np.full((1, 1), 512, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make_golden(Path(sys.argv[1]))
    if "--golden" not in sys.argv:
        make_others(Path(sys.argv[1]))
