"""Hessians of outputs, against gradients with respect to weights that Transformers' own model gives."""

import pytest
import torch

import tiny
from halfbyte.errors import Unsupported
from halfbyte.models import memory
from halfbyte.models.backward import Backward
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.guidance import output_hessians
from halfbyte.models.placement import Placement
from halfbyte.models.standins import Calls
from halfbyte.progress import silent
from halfbyte.solvers.outputs import OutputHessian
from models.families import FAMILIES

TOKEN = torch.randint(0, 200, (1, 1), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 200, (9, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_of_one_token_they_are_those_of_the_gradients_of_weights(family, tmp_path, monkeypatch):
    """Of a single token the gradient of a weight is g x^T, so its product with itself is g g^T, times ||x||^2."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))
    checkpoint = Checkpoint.open(FAMILIES[family].save(tmp_path / "model"))
    gradients, found = {}, {}
    for of_weights in (True, False):
        back = Backward(checkpoint, TOKEN)
        for _ in back.predictions():
            pass
        for block in back:
            for batch in back.samples:
                if of_weights:
                    gradients |= dict(zip(block.weights, back.through(block, batch, block.weights), strict=True))
                else:
                    back.observe(block, batch, lambda weight, g: found.update({weight: g}))
    reached = {weight: g for weight, g in gradients.items() if g.abs().max() > 1e-12}
    # Of one token, what queries and keys say changes nothing.
    named = {weight.name for weight in reached}
    assert len(named) >= 2 * 3
    for weight, gradient in reached.items():
        theirs, ours = gradient @ gradient.T, found[weight].T @ found[weight]
        assert ours.shape == (weight.shape[0], weight.shape[0])
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("guidance") / "model", num_hidden_layers=3))


def hessians(model: Checkpoint, wanted=None, **placement) -> dict:
    weights = [weight for weight in model.weights() if weight.block]
    return output_hessians(model, WINDOWS, weights if wanted is None else wanted, Placement(**placement), silent)


def same(some: OutputHessian, other: OutputHessian) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some.blocks, other.blocks, strict=True))


def test_every_weight_has_one_and_a_part_of_them_is_the_same(model, tmp_path):
    whole = hessians(model)
    assert len(whole) == 3 * 7
    assert all(hessian.tokens == WINDOWS.numel() for hessian in whole.values())
    last = [weight for weight in whole if weight.block.endswith("2")]
    part = hessians(model, last)
    assert part.keys() == set(last)
    in_files = hessians(model, scratch=tmp_path, hidden_memory_bytes=0)
    assert all(same(whole[weight], part[weight]) for weight in last)
    assert all(same(whole[weight], in_files[weight]) for weight in whole)
    assert hessians(model, []) == {}


def test_of_long_texts_windows_are_taken_evenly(model, monkeypatch):
    monkeypatch.setattr(memory, "GUIDING_TOKENS", 2 * WINDOWS.shape[1])
    assert {hessian.tokens for hessian in hessians(model).values()} == {2 * WINDOWS.shape[1]}
    assert memory.guiding_tokens(*WINDOWS.shape) == 2 * WINDOWS.shape[1]


def test_what_few_tokens_reach_has_none(model):
    few = output_hessians(model, WINDOWS[:1, :16], [w for w in model.weights() if w.block], Placement(), silent)
    assert few == {}


def test_models_through_which_no_gradients_go_are_refused(model, monkeypatch):
    monkeypatch.setattr(Calls, "carries", True)
    with pytest.raises(Unsupported, match="--method gptq without guided"):
        hessians(model)
