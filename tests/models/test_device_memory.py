"""What a pass takes of a device is known from shapes, and what is known is so."""

import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import halfbyte
import tiny
from halfbyte.grids import parse
from halfbyte.kernels import choose
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.memory import device_memory
from halfbyte.models.placement import Placement

GPU = torch.device("cuda:0")
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def shapes_of_llama(config: dict) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    cached = width // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (cached, width), "self_attn.v_proj": (cached, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    outside = {
        "model.embed_tokens": (config["vocab_size"], width),
        "model.norm": (width,),
        "lm_head": (config["vocab_size"], width),
    }
    layers = range(config["num_hidden_layers"])
    inside = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in {**outside, **inside}.items()}


def without_weights(folder: Path, config: dict) -> Checkpoint:
    """A checkpoint whose file has holes where the weights are: it takes no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in shapes_of_llama(config).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    words = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + at)
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("samples", "length", "full_precision"), [(128, 2048, False), (512, 512, False), (128, 2048, True)]
)
def test_a_model_of_8_billion_parameters_takes_12_gb_of_a_gpu(tmp_path, samples, length, full_precision):
    checkpoint = without_weights(tmp_path / "model", LLAMA_8B)
    placement = Placement.on(GPU, free_bytes=12_000_000_000)
    memory = device_memory(checkpoint, samples, length, placement, full_precision)
    assert memory.total < 12e9
    assert memory.statistics >= 4 * 14336**2
    assert memory.block > 430e6
    more = device_memory(checkpoint, 64 * samples, length, placement, full_precision)
    assert more.total < 12e9  # hidden states beyond their share are kept elsewhere


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were there at a time, of those that operations have made."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if storage.nbytes() and key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_what_the_model_of_memory_says_is_what_a_run_takes(tmp_path, monkeypatch):
    source = tiny.make(
        tmp_path / "model", hidden_size=256, intermediate_size=768, num_attention_heads=4, num_hidden_layers=2
    )
    placement = Placement(hidden_device_bytes=10**9, batch_tokens=512)
    monkeypatch.setattr(Placement, "on", lambda device, scratch=None: placement)
    calibration = {"source": str(tiny.text(tmp_path / "text.txt")), "samples": 24, "length": 128}
    expected = device_memory(Checkpoint.open(source), 24, 128, placement)
    with Peak() as peak:
        halfbyte.quantize(source, tmp_path / "out", method="gptq", calibration=calibration, device="cpu")
    assert 0.4 * expected.total < peak.most < expected.total


@pytest.mark.parametrize("name", ["int4-g128-asym", "nf4-g64", "fp8-e4m3-channel", "nvfp4", "mxfp4", "q4_k"])
def test_a_grid_says_what_fitting_takes_of_a_gpu(name):
    grid, w = parse(name), torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    with choose.using("reference"), Peak() as peak:
        grid.fit(w, None)
    assert 0.55 * grid.fitting_bytes < peak.most / w.numel() < 1.05 * grid.fitting_bytes
