"""Reward and embedding models: calibrated, written, loaded as the class that they are, and compared by their last
hidden states."""

import json

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte.errors import BadRequest

CLASSES = {"reward": "AutoModelForSequenceClassification", "embedding": "AutoModel"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module", params=CLASSES)
def folder(request, tmp_path_factory):
    """The model without a head."""
    home = tmp_path_factory.mktemp(request.param)
    made = tiny.make(home / "llama")
    config = transformers.AutoConfig.from_pretrained(made, num_labels=1, pad_token_id=257)
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[request.param]).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(home / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "model" / name).write_bytes((made / name).read_bytes())
    return home / "model"


def test_last_hidden_states_are_compared(folder, text, tmp_path):
    calibration = {"source": str(text), "samples": 4, "length": 32}
    for method, out in (("gptq", "gptq"), ("nearest", "nearest")):
        halfbyte.quantize(
            folder, tmp_path / out, method=method, grid="int3-g64", to="compressed-tensors", calibration=calibration
        )
    found = halfbyte.evaluate([tmp_path / "gptq", tmp_path / "nearest"], folder, str(text), length=32, windows=4)
    assert found["compared"] == "last hidden states"

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        text.read_text(), add_special_tokens=False, return_tensors="pt"
    )["input_ids"][0, :128].view(4, 32)
    original = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = original(tokens).last_hidden_state
        for row, out in zip(found["models"], ("gptq", "nearest"), strict=True):
            ours = halfbyte.load(tmp_path / out, torch.float32)
            assert type(ours).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
            states = ours.base_model(tokens).last_hidden_state
            error = (states - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            assert row["state_error"] == pytest.approx(error.mean().item(), rel=1e-3)
            assert row["cosine"] == pytest.approx(
                torch.nn.functional.cosine_similarity(states, wanted, dim=-1).mean().item(), rel=1e-4
            )
            assert 0.01 < row["state_error"] < 0.6
    assert found["models"][0]["state_error"] < found["models"][1]["state_error"]
    assert "relative error of last hidden states" in (tmp_path / "gptq" / "README.md").read_text()

    shown = tiny.halfbyte(
        "eval", tmp_path / "gptq", "--against", folder, "--text", text, "--length", 32, "--windows", 4
    )
    assert shown.code == 0
    assert "last hidden states are compared" in shown.out


def test_a_model_with_a_head_and_one_without_are_not_compared(folder, text):
    with pytest.raises(BadRequest, match="predicts tokens and the other has no head for it"):
        halfbyte.evaluate([folder], folder.parent / "llama", str(text), length=32)


@pytest.mark.parametrize("asked", [["--noise-floor"], ["--gate", "kl=1"]])
def test_what_is_measured_of_predictions_alone_is_refused(asked, folder, text):
    tiny.refused(
        tiny.halfbyte("eval", folder, "--against", folder, "--text", text, "--length", 32, *asked),
        "predicts no tokens",
    )
