"""llama.cpp as the judge of what a GGUF means: a checkpoint written in F32 by halfbyte's tables, loaded and run by llama.cpp's own library."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfbyte.containers.gguf.families import Translation, family_of
from halfbyte.containers.gguf.file import Writer
from halfbyte.containers.gguf.hyperparameters import metadata
from halfbyte.containers.gguf.tokenizer import tokenizer_metadata

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")


def write(folder: Path, path: Path, **options) -> Path:
    """The checkpoint in `folder` as a GGUF of F32."""
    config = json.loads((folder / "config.json").read_text())
    checkpoint = {name: t.float() for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    family = family_of(config)
    translation = Translation(family, config, {name: tuple(t.shape) for name, t in checkpoint.items()})
    filled: dict[str, dict[int, torch.Tensor]] = {}
    for name, t in checkpoint.items():
        for place in translation.places(name):
            value = t.transpose(-1, -2) if place.transposed else t
            if place.rows is not None:
                value = value.index_select(max(value.dim() - 2, 0), place.rows)
            filled.setdefault(place.name, {})[place.expert or 0] = value + place.add
    tensors = {name: parts[0] if len(parts) == 1 else torch.stack([parts[e] for e in sorted(parts)]) for name, parts in filled.items()} | translation.extra()
    said = metadata(config, family, folder) | tokenizer_metadata(folder, translation.settings.vocab_size, **options)
    writer = Writer(path, said, {name: ("F32", tuple(t.shape)) for name, t in tensors.items()})
    for name, t in tensors.items():
        writer.write(name, t.contiguous())
    writer.close()
    return path


def load(path: Path, vocabulary_only: bool = False):
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, vocab_only=vocabulary_only, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False,
    )  # fmt: skip


def logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """[position, vocabulary]"""
    model = load(path)
    try:
        model.eval(tokens)
        return torch.from_numpy(np.array(model.scores[: len(tokens)]))
    finally:
        model.close()


def tokenize(model, text: str, special: bool = True) -> list[int]:
    return model.tokenize(text.encode(), add_bos=True, special=special)
