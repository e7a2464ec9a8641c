"""Answers that are computed together are those that each gets alone; a model that does not do that is found out."""

from types import SimpleNamespace

import pytest
import torch

from halfbyte import demo
from halfbyte.inference.generation import CachedSequence, Generation
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.together import read_together, reads_together
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES, every

ALONE = {"bloom", "gemma2", "gemma3", "gpt_oss", "lfm2", "llama4", "mamba", "mistral", "qwen3_5_moe"}
"""Windows, states, and positions that a model is not told: these take turns."""


def answering(model) -> Answering:
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(chr, tokens)))
    tokens = SimpleNamespace(encode=lambda text: [3 + ord(letter) % 200 for letter in text][: 4 * len(text.split())])
    made = Answering(Checkpoint.open(demo.MODEL), model, tokenizer, None, frozenset(), 64, torch.device("cpu"))
    object.__setattr__(made, "encode", tokens.encode)
    return made


@pytest.mark.parametrize("name", every())
def test_families_that_read_together_answer_as_alone(name):
    opened = answering(FAMILIES[name].build())
    assert reads_together(opened) == (name not in ALONE)
    if name in ALONE or opened.model.dtype != torch.float32:
        return
    prompts = [list(range(5, 5 + length)) for length in (3, 20, 11)]
    wanted = [[piece.tokens for piece in Generation(opened, prompt, Sampling(max_tokens=8))] for prompt in prompts]
    together = [Generation(opened, prompt, Sampling(max_tokens=8)) for prompt in prompts]
    found = [[next(generation).tokens] for generation in together]
    for _ in range(7):
        sequences, tokens = [one.sequence for one in together], [one.pending[0] for one in together]
        for generation, row, said in zip(together, read_together(opened, sequences, tokens), found, strict=True):
            said.append(generation.take(row, 0.0).tokens)
    assert found == wanted


def test_a_model_that_does_not_look_at_the_mask_is_found_out(monkeypatch):
    opened = Answering.open(demo.MODEL, device="cpu", dtype="float32")
    assert reads_together(opened)
    forward = opened.model.forward

    def blind(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        return forward(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **more)

    monkeypatch.setattr(opened.model, "forward", blind)
    assert not reads_together(opened)


def test_a_cache_that_is_lent_is_nowhere_else():
    opened = Answering.open(demo.MODEL, device="cpu", dtype="float32")
    sequence = CachedSequence(opened.model)
    sequence.read([1, 2, 3])
    tokens, cache = sequence.lend()
    assert (tokens, sequence.tokens, sequence.is_plain) == ([1, 2, 3], [], False)
    sequence.give_back(tokens, cache)
    assert sequence.is_plain
