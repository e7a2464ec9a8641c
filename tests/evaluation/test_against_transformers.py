"""Perplexity and divergence against a plain computation: Transformers' own models, whole, all logits at once."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.evaluation import divergence
from halfbyte.evaluation.conventions import CONVENTIONS
from halfbyte.evaluation.divergence import mean_and_error
from halfbyte.models.checkpoint import Checkpoint

LENGTH, WINDOWS = 48, 5


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("evaluate")
    tiny.make(home / "model", adds_bos=True)
    tiny.text(home / "text.txt", 200)
    for bits in (4, 3):
        halfbyte.quantize(home / "model", home / f"int{bits}", method="nearest", grid=f"int{bits}-g64")
    return home


def windows_of(home: Path, convention: str) -> torch.Tensor:
    """Every byte is a token, and the tokenizer's ids are those of byte-level BPE; 256 is BOS, which the tokenizer puts
    before a text."""
    letters = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    text = (home / "text.txt").read_text().replace(" ", "Ġ")
    ids = torch.tensor([letters.index(c) for c in text])
    if convention == "served":
        return torch.cat([torch.full((WINDOWS, 1), 256), ids[: (LENGTH - 1) * WINDOWS].view(WINDOWS, LENGTH - 1)], 1)
    windows = ids[: LENGTH * WINDOWS].view(WINDOWS, LENGTH)
    if convention == "llama.cpp":
        windows[:, 0] = 256
    return windows


@torch.no_grad()
def log_probabilities(path: Path, windows: torch.Tensor) -> torch.Tensor:
    """Of the plain model; of one of ours, with every linear's weight as it is decoded."""
    checkpoint = Checkpoint(path)
    if not checkpoint.quantized:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        config = transformers.AutoConfig.from_pretrained(path)
        del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.tensors()})
    return model.eval()(windows).logits.double().log_softmax(-1)


def expected(home: Path, name: str, convention: str) -> dict[str, float]:
    windows = windows_of(home, convention)
    first = LENGTH // 2 if convention == "llama.cpp" else 0
    p, q = log_probabilities(home / "model", windows), log_probabilities(home / name, windows)
    following = windows[:, first + 1 :, None]
    p, q = p[:, first:-1], q[:, first:-1]
    chosen = q.gather(-1, following)
    kl = (p.exp() * (p - q)).sum(-1)
    change = (chosen.exp() - p.gather(-1, following).exp())[..., 0]
    return {
        "tokens": kl.numel(),
        "perplexity": float((-chosen.mean()).exp()),
        "kl": float(kl.mean()),
        "kl_error": float(kl.mean(1).std() / WINDOWS**0.5),
        "kl_median": float(kl.flatten().sort().values[kl.numel() // 2]),
        "kl_max": float(kl.max()),
        "same_top": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "probability_change_rms": float(change.square().mean().sqrt()),
    }


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_evaluate(convention, home):
    """5 windows: LENGTH - 1 positions of each, or the second half without its first half's context being scored."""
    found = halfbyte.evaluate(
        [home / "int4", home / "int3"], home / "model", str(home / "text.txt"), LENGTH, WINDOWS, convention
    )
    assert found["windows"] == WINDOWS
    assert found["opening"] == ([] if convention == "papers" else [tiny.BOS])
    assert (
        found["tokens_sha256"]
        == hashlib.sha256(windows_of(home, convention).to(torch.int32).numpy().tobytes()).hexdigest()
    )
    for row, name in zip(found["models"], ["int4", "int3"], strict=True):
        wanted = expected(home, name, convention)
        assert (
            row["tokens"]
            == wanted["tokens"]
            == WINDOWS * (LENGTH - LENGTH // 2 - 1 if convention == "llama.cpp" else LENGTH - 1)
        )
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert found["reference"]["perplexity"] == pytest.approx(
        expected(home, "model", convention)["perplexity"], rel=1e-4
    )
    assert found["models"][1]["kl"] > 2 * found["models"][0]["kl"] > 0


def test_conventions_differ(home):
    found = [
        halfbyte.evaluate([home / "int4"], home / "model", str(home / "text.txt"), LENGTH, WINDOWS, c)
        for c in CONVENTIONS
    ]
    assert (
        len({one["models"][0]["perplexity"] for one in found})
        == len({one["tokens_sha256"] for one in found})
        == len(CONVENTIONS)
    )


@pytest.mark.slow
def test_slices_change_nothing(home, monkeypatch):
    """A long text is walked a few windows at a time; so is this short one when little memory is allowed."""
    text = str(home / "text.txt")
    whole = halfbyte.evaluate([home / "int4", home / "int3"], home / "model", text, LENGTH, windows=12)
    monkeypatch.setattr(divergence, "HIDDEN_BYTES", 2 * LENGTH * 128 * 4)
    sliced = halfbyte.evaluate([home / "int4", home / "int3"], home / "model", text, LENGTH, windows=12)
    assert whole["windows"] > 10
    assert sliced == whole


def test_one_at_a_time_is_the_same(home):
    text = str(home / "text.txt")
    both = halfbyte.evaluate([home / "int4", home / "int3"], home / "model", text, LENGTH)
    alone = halfbyte.evaluate([home / "int3"], home / "model", text, LENGTH)
    difference = {"kl_minus_first", "nll_minus_first"}
    assert alone.models[0].as_dict() == {k: v for k, v in both.models[1].as_dict().items() if k not in difference}
    assert not difference & both.models[0].as_dict().keys()


def test_paired_difference(home):
    """Both models stumble over the same tokens, so their difference is known better than either."""
    text = str(home / "text.txt")
    first, second = halfbyte.evaluate([home / "int4", home / "int3"], home / "model", text, LENGTH).models
    difference, error = second["kl_minus_first"]
    assert difference == pytest.approx(second["kl"] - first["kl"])
    assert 0 < error < (first["kl_error"] ** 2 + second["kl_error"] ** 2) ** 0.5
    change, error = second["perplexity_minus_reference"]
    assert 0 < error < second["perplexity_error"]
    assert change == pytest.approx(second["perplexity"] * (1 - np.exp(-second["nll_minus_reference"][0])), rel=1e-3)
    assert second["nll_minus_first"][0] == pytest.approx(second["nll"] - first["nll"])


def test_a_model_does_not_diverge_from_itself(home):
    row = halfbyte.evaluate([home / "model"], home / "model", str(home / "text.txt"), LENGTH)["models"][0]
    assert row["kl"] == row["kl_max"] == row["probability_change_rms"] == 0
    assert row["same_top"] == 1


def test_a_model_that_says_nothing_does_not_say_the_same(home, tmp_path):
    """Of all words alike, the first is the most likely, as for Transformers, and not whatever the original says."""
    silent = shutil.copytree(home / "model", tmp_path / "silent")
    tensors = load_file(silent / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, silent / "model.safetensors", {"format": "pt"})
    row = halfbyte.evaluate([silent], home / "model", str(home / "text.txt"), LENGTH, foreign=True)["models"][0]
    assert row["perplexity"] == pytest.approx(264)
    assert row["same_top"] < 0.1


def test_errors_count_windows():
    """Tokens of one window hang together: ten equal tokens in each of two windows are two samples, not twenty."""
    values = torch.tensor([[1.0] * 10, [3.0] * 10])
    assert mean_and_error(values) == (2.0, pytest.approx(1.0))


def test_other_vocabulary(home, tmp_path):
    tiny.make(tmp_path / "other", vocab_size=300)
    tiny.refused(
        tiny.halfbyte(
            "eval", tmp_path / "other", "--against", home / "model", "--text", home / "text.txt", "--length", "48"
        ),
        "different vocabularies",
    )


def test_the_size_stands_beside_the_loss(home):
    found = halfbyte.evaluate([home / "int4"], home / "model", str(home / "text.txt"), LENGTH, WINDOWS)
    for row, name in ((found["reference"], "model"), (found["models"][0], "int4")):
        counts = halfbyte.inspect(home / name)
        assert (row["size_bytes"], row["bits_per_parameter"]) == (counts["size_bytes"], counts["bits_per_parameter"])
    said = tiny.halfbyte(
        "eval", home / "int4", "--against", home / "model", "--text", home / "text.txt", "--length", LENGTH
    )
    assert all(f"{row['size_bytes'] / 1e6:.1f}" in said.out for row in (found["reference"], found["models"][0]))


def test_the_measurement_is_written_into_the_folder(home):
    said = tiny.halfbyte(
        "eval", home / "int4", "--against", home / "model", "--text", home / "text.txt", "--length", LENGTH
    )
    assert said.code == 0, said.err
    written = json.loads((home / "int4" / "report.json").read_text())["evaluation"]
    assert f"{written['model']['kl']:.5f}" in said.out
    assert f"{written['model']['kl']:.5f}" in (home / "int4" / "README.md").read_text()
    assert f"KL to the original {written['model']['kl']:.5f}" in tiny.halfbyte("inspect", home / "int4").out
    assert not (home / "model" / "report.json").exists()


def test_a_shorter_run_and_another_reference_do_not_replace_what_the_card_shows(home, tmp_path):
    halfbyte.quantize(home / "model", tmp_path / "out", method="nearest", grid="int4-g64")
    text = str(home / "text.txt")
    for reference, windows in ((home / "model", 5), (home / "model", 2), (home / "int4", 9), (home / "model", 5)):
        halfbyte.evaluate([tmp_path / "out"], reference, text, LENGTH, windows, foreign=reference == home / "int4")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted((e["windows"], Path(e["reference_path"]).name) for e in report["evaluations"]) == [
        (2, "model"),
        (5, "model"),
        (9, "int4"),
    ]
    assert report["evaluation"]["windows"] == 5
    assert report["evaluation"]["model"]["kl"] > 0
    assert f"{report['evaluation']['model']['kl']:.5f}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 99}, "is of schema version 99, and this halfbyte reads 1; what was measured is not put"),
        ({"weights": 3}, "is no report of this version's: weights: "),
        (None, "is no report of this version's: kv: field required; what was measured is not put into it"),
    ],
)
def test_a_report_of_another_form_stays_as_it_is_and_is_named(home, tmp_path, change, reason):
    out = Path(shutil.copytree(home / "int4", tmp_path / "out"))
    report = {**json.loads((out / "report.json").read_text()), **change} if change else {"halfbyte": "0.0.0"}
    (out / "report.json").write_text(json.dumps(report))
    words = "--against", home / "model", "--text", home / "text.txt", "--length", LENGTH
    said = tiny.halfbyte("eval", out, *words)
    assert said.code == 0
    assert f"note: {out / 'report.json'} {reason}" in " ".join(said.out.split())
    assert json.loads((out / "report.json").read_text()) == report
    shown = tiny.halfbyte("inspect", out)
    assert shown.code == 0
    assert "nothing of it is shown" in " ".join(shown.out.split())


def test_a_report_of_before_there_were_schema_versions_takes_measurements(home, tmp_path):
    out = Path(shutil.copytree(home / "int4", tmp_path / "out"))
    report = json.loads((out / "report.json").read_text())
    assert report.pop("schema_version") == 1
    report["weights"] = [{**row, "input": row.pop("activations")} for row in report["weights"]]  # as it was called
    (out / "report.json").write_text(json.dumps(report))
    result = halfbyte.evaluate([out], home / "model", str(home / "text.txt"), LENGTH, 2)
    assert result.warnings == []
    written = json.loads((out / "report.json").read_text())
    assert written["evaluations"][-1]["model"]["kl"] == result.models[0].kl
