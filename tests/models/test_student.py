"""How far a model with other weights is from the original, and the gradients of it, as of Transformers' whole model."""

import pytest
import torch
import transformers

import tiny
from halfbyte.models import student as student_module
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.student import KEPT, Prediction, Student

WINDOWS = torch.randint(0, 200, (4, 24), generator=torch.Generator().manual_seed(1))


class Rounded:
    """A checkpoint whose matrices of blocks have few bits."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def read(self, tensor: str) -> torch.Tensor:
        value = self.checkpoint.read(tensor).float()
        return (value * 40).round() / 40 if value.dim() == 2 and ".layers." in tensor else value


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole_model(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(student_module, "KEPT", 264)  # all of them
    tiny.make(tmp_path / "model", tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(tmp_path / "model")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    rounded = Rounded(checkpoint)
    model.load_state_dict({n: rounded.read(n) for n in model.state_dict() if n in checkpoint.tensors()}, strict=False)
    with torch.no_grad():
        wanted = original(WINDOWS[:2]).logits.log_softmax(-1)
    lost = (wanted.exp() * (wanted - model(WINDOWS[:2]).logits.log_softmax(-1))).sum(-1).mean()
    lost.backward()
    student = Student(checkpoint, WINDOWS, 2, rounded, Placement())
    assert student.divergence(student.batches[0]) == pytest.approx(lost.item(), rel=1e-3)
    found = {}
    student.step(student.batches[0], lambda block, gradients: found.update(gradients))
    theirs = {name: p.grad for name, p in model.named_parameters() if name.startswith("model.layers") or p.dim() == 1}
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7)


def test_a_prediction_of_few_tokens_is_nearly_the_whole():
    logits, others = torch.randn(2, 5, 2 * KEPT, generator=torch.Generator().manual_seed(0)) * 4
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    some = Prediction.of(logits).divergence(others)
    assert (some <= whole + 1e-5).all()  # what counts as one tells less
    torch.testing.assert_close(some, whole, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(
        Prediction.of(logits[:, :KEPT]).divergence(logits[:, :KEPT]), torch.zeros(5), rtol=0, atol=1e-5
    )
