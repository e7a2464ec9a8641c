"""What calibrates and what is loaded is the model that Transformers runs, for every family that Transformers can build,
or is refused by name."""

import pytest
import torch
import transformers

import halfbyte
from halfbyte.errors import Unsupported
from halfbyte.models import mapping
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.walk import Walk
from models.every import ENCODERS, EVERY, TOKENS, outputs

ENCODER_LISTS = (
    "bert bert-generation big_bird camembert cpmant data2vec-text electra ernie git megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer "
    "xlm-roberta xlm-roberta-xl"
)
REFUSED = {
    **dict.fromkeys(ENCODER_LISTS.split(), "no list of decoder layers"),
    "xlm": "run decoders on text",
    "ernie4_5_vl_moe": "by Chunk",
    "hrm_text": "no list of decoder layers",
    "inkling2_text": "by Interleave",
}
"""Families that no walk follows, and why."""
UNLOADED = {
    "ernie4_5_vl_moe": "by Chunk",
    "hrm_text": "by Chunk",
    "inkling2_text": "by Interleave",
    "kimi_k25": "by Chunk",
}
"""Families of which a tensor of the checkpoint is several parameters, or lies in another order."""


def walked(checkpoint: Checkpoint) -> torch.Tensor:
    walk = Walk(checkpoint, TOKENS, torch.float32)
    for _ in walk:
        pass
    assert sum(p.untyped_storage().nbytes() for p in walk.model.parameters() if not p.is_meta) < 8 * len(
        list(walk.model.parameters())
    )
    return torch.cat([logits for _, logits in walk.logits()])


def buffers(model: torch.nn.Module, stored: set[str]) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if name not in stored}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_walk_and_a_loaded_model_compute_what_transformers_computes(name, tmp_path):
    folder = EVERY[name].save(tmp_path / "model")
    theirs = getattr(transformers, EVERY[name].by).from_pretrained(folder, dtype=torch.float32).eval()
    expected = outputs(theirs)
    assert torch.isfinite(expected).all()
    assert expected.std() > 1e-3
    checkpoint = Checkpoint.open(folder)

    if name in UNLOADED:
        with pytest.raises(Unsupported, match=UNLOADED[name]):
            halfbyte.load(folder)
    else:
        ours = halfbyte.load(folder, torch.float32)
        assert type(ours) is type(theirs)
        filled = {place.parameter for place in mapping.places(ours, checkpoint.tensors()).values()}
        for buffer, value in buffers(theirs, filled).items():
            torch.testing.assert_close(ours.get_buffer(buffer), value, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=0)

    if name in REFUSED:
        with pytest.raises(Unsupported, match=REFUSED[name]) as refusal:
            walked(checkpoint)
        assert "--method nearest" in str(refusal.value)
    else:
        torch.testing.assert_close(walked(checkpoint), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "llama4_text", "llama4"])
def test_a_model_whose_base_is_itself_is_measured_too(name, tmp_path):
    """Llama 4's classes are their own base, and predict all the same."""
    folder = EVERY[name].save(tmp_path / "model")
    expected = outputs(getattr(transformers, EVERY[name].by).from_pretrained(folder, dtype=torch.float32).eval())
    walk = Walk(Checkpoint.open(folder), TOKENS, torch.float32)
    for _ in walk:
        pass
    walk.ends.finish()
    with walk.ends.head() as predict:
        ours = torch.cat([predict(batch, slice(None)) for batch in range(1, len(walk.batches))])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused_by_name_and_told_what_works(name, tmp_path):
    with pytest.raises(Unsupported, match=r"run decoders on text, and \w+ is none.*--method nearest"):
        walked(Checkpoint.open(ENCODERS[name].save(tmp_path / "model")))
