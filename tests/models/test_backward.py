"""Gradients block by block, against those of Transformers' whole model."""

import pytest
import torch
import transformers

import tiny
from halfbyte.models.backward import Backward
from halfbyte.models.checkpoint import Checkpoint

WINDOWS = torch.randint(0, 200, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole_model(tmp_path, monkeypatch, tied):
    tiny.make(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=tied)
    # Labels are drawn in both from what the model says; here each is the likeliest.
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    theirs: list[dict[str, torch.Tensor]] = []
    for window in WINDOWS:
        model.zero_grad()
        said = model(window[None]).logits[0].log_softmax(-1)
        said.gather(1, said.argmax(-1, keepdim=True)).sum().backward()
        theirs.append({name: p.grad.clone() for name, p in model.named_parameters()})

    back = Backward(Checkpoint(tmp_path / "model"), WINDOWS)
    read = [(hidden, p) for hidden, p in back.predictions()]
    for block in back:
        for number, batch in enumerate(back.samples):
            for weight, gradient in zip(block.weights, back.through(block, batch, block.weights), strict=True):
                torch.testing.assert_close(gradient, theirs[number][weight.tensor], rtol=1e-3, atol=1e-4)
    at_embedding = list(back.embedding("model.embed_tokens.weight"))
    assert len(at_embedding) == len(WINDOWS)
    for number, gradient in enumerate(at_embedding):
        of_head = 0.0
        if tied:  # the same tensor at the other end
            hidden, p = (torch.cat(parts) for parts in zip(*read, strict=True))
            mine = slice(number * 24, (number + 1) * 24)
            drawn = torch.nn.functional.one_hot(p[mine].argmax(-1), p.shape[1]).float()
            of_head = (drawn - p[mine]).T @ hidden[mine]
        whole = theirs[number]["model.embed_tokens.weight"]
        torch.testing.assert_close(gradient + of_head, whole, rtol=1e-3, atol=1e-4)
