"""llama.cpp computes from our GGUF what Transformers computes from the checkpoint."""

from pathlib import Path

import pytest
import torch
from llamacpp import logits
from variants import CASES, as_f32, distance, transformers_logits

import halfbyte.demo
from halfbyte.targets.gguf.families import FAMILIES
from models.families import Family

DEMO = Path(halfbyte.demo.__file__).parent / "model"
COARSE = {
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-stretched",
    "gpt2",
    "starcoder2",
    "gpt_neox",
    "gpt_neox-sequential",
    "falcon",
    "falcon-new",
    "falcon-one-norm",
}
"""Families with GELU, which llama.cpp looks up in a table of 16 bits."""


def test_the_demo_model_says_the_same(tmp_path):
    tokens = torch.randint(2, 4096, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert distance(logits(as_f32(DEMO, tmp_path / "model.gguf"), tokens), transformers_logits(DEMO, tokens)) < 1e-4


@pytest.mark.parametrize("published", [True, False], ids=["as-published", "as-in-memory"])
@pytest.mark.parametrize("name", CASES)
def test_a_family_says_the_same(name, published, tmp_path):
    kind, changes = CASES[name]
    folder = Family(kind, {}, changes, as_published=published).save(tmp_path / "model")
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = logits(as_f32(folder, tmp_path / "model.gguf"), tokens), transformers_logits(folder, tokens)
    assert distance(ours, theirs) < (3e-3 if name in COARSE else 1e-4)


def test_every_family_of_the_table_is_compared():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
