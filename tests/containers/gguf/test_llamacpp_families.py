"""llama.cpp computes from our GGUF what Transformers computes from the checkpoint."""

from pathlib import Path

import pytest
import torch
import transformers
from llamacpp import logits, write

import halfbyte.demo

DEMO = Path(halfbyte.demo.__file__).parent / "model"


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def test_the_demo_model_says_the_same(tmp_path):
    tokens = torch.randint(2, 4096, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = logits(write(DEMO, tmp_path / "model.gguf"), tokens)
    theirs = transformers_logits(DEMO, tokens)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
