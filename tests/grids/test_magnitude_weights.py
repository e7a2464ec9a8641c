"""Rounding by importance, as llama.cpp understands it: an error in a large weight counts for more."""

import ggml
import pytest
import torch

from halfbyte.grids.kquant import KQUANTS
from halfbyte.solvers.nearest import nearest
from halfbyte.solvers.statistics import Diagonal


@pytest.mark.parametrize("name", ["q2_k", "q3_k"])
def test_what_llama_cpp_minimises_is_no_larger_than_its_own(name):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 512, generator=generator) * 0.02
    importance = torch.rand(512, generator=generator) ** 4 + 0.01
    counts = importance * (w.square() + w.square().mean(1, keepdim=True)).sqrt()
    ours = nearest(w, KQUANTS[name], Diagonal(importance)).decode()
    theirs = ggml.encode(name, w, importance)
    lost = [(counts * (found - w).square()).sum() for found in (ours, theirs)]
    assert lost[0] <= lost[1]
