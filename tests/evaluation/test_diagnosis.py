"""What stands out: kinds of tokens, positions, weights and inputs, and nothing where all lose alike."""

import json

import pytest
import torch

import halfbyte
import tiny
from halfbyte.evaluation import classes, divergence
from halfbyte.report import types, written
from halfbyte.report.diagnosis import findings


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("diagnosis")
    tiny.make(home / "model")
    tiny.text(home / "text.txt", 200)
    halfbyte.quantize(home / "model", home / "int3", method="nearest", grid="int3-g64")
    return home


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("12", "numbers"), (" 2nd", "numbers"), (" the", "words after a space"), ("ing", "parts of words"),
        ("猫", "other scripts than Latin"), (" мир", "other scripts than Latin"), ("é", "letters with accents"),
        (" {", "marks of code"), ("\n\n", "white space"), (",", "punctuation"), ("", None),
    ],
)  # fmt: skip
def test_kinds_of_tokens(text, name):
    names = [*classes.CLASSES, None]
    assert names[classes._class(text)] == name


def test_means_by_class_are_those_of_the_tokens():
    values, kinds = torch.rand(4, 50), torch.randint(3, (4, 50))
    kinds[0][kinds[0] == 2] = 1
    for row, name in zip(divergence.by_class(values, kinds), classes.CLASSES, strict=False):
        own = kinds == list(classes.CLASSES).index(name)
        assert row["name"] == name
        assert row["tokens"] == int(own.sum())
        assert row["kl"] == pytest.approx(float(values[own].mean()), rel=1e-5)
        means = torch.stack([v[k].mean() for v, k in zip(values, own, strict=True) if k.any()])
        assert row["kl_error"] == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-4)


def test_classes_add_up_to_the_whole(home):
    row = halfbyte.evaluate(home / "int3", home / "model", str(home / "text.txt"), 48, 4).models[0]
    parts = row.kl_by_class
    assert sum(part.tokens for part in parts) == row.tokens
    assert sum(part.tokens * part.kl for part in parts) == pytest.approx(row.tokens * row.kl, rel=1e-5)
    assert {part.name for part in parts} == {"parts of words", "white space"}  # of a tokenizer of single letters


def test_what_stands_out_is_said(home):
    report = written.report_or_none(home / "int3")
    row = halfbyte.evaluate(home / "int3", home / "model", str(home / "text.txt"), 48, 4).models[0]

    def said(**parts):
        return findings(row.model_copy(update={"kl": 0.1, "kl_by_class": [], "kl_by_position": [], **parts}), report)

    def numbers(**changes):
        return types.OfClass(**{"name": "numbers", "tokens": 100, "kl": 0.5, "kl_error": 0.05, **changes})

    assert not [line for line in said() if "numbers" in line]
    assert "numbers lose 5.0 times the average: KL 0.5000 ± 0.0500 on 100 of" in said(kl_by_class=[numbers()])[0]
    for quiet in ({"kl": 0.15}, {"kl_error": 0.2}, {"tokens": 5}, {"kl_error": None}):
        assert not [line for line in said(kl_by_class=[numbers(**quiet)]) if "numbers" in line]
    stretch = types.AtPositions(first=480, last=511, kl=0.4, kl_error=0.01)
    assert "positions 480 to 511" in said(kl_by_position=[stretch])[0]
    assert said(kl=1e-5, kl_by_class=[numbers()]) == []


def test_weights_and_inputs_that_stand_out(home):
    report = written.report_or_none(home / "int3")
    first, *others = report.weights
    cut = {
        "grid": "int8-tensor",
        "low": -1.0,
        "high": 1.0,
        "error": 0.5,
        "values": 100,
        "saturated": 20,
        "clipped": 0.2,
    }
    worst = first.model_copy(update={"error": 9.0, "tokens": 0, "activations": types.ActivationReport(**cut)})
    row = types.Divergence(
        path="x", tokens=9, nll=1.0, perplexity=2.7, kl=0.1, kl_error=0.1, kl_median=0.1, kl_p99=0.1, kl_max=0.1,
        same_top=0.5, probability_change=0.0, probability_change_rms=0.0,
    )  # fmt: skip
    said = "\n".join(findings(row, report.model_copy(update={"weights": [worst, *others]})))
    assert f"{first.name} on {first.grid} has" in said
    assert "1 weight reads activations that are cut by their scale" in said
    assert f"no calibration token reached 1 weight, such as the expert {first.name}" in said
    assert findings(row, report) == []


def test_the_command_says_it(home, monkeypatch):
    monkeypatch.setattr("halfbyte.report.measured.findings", lambda row, report: ["numbers lose 5.0 times"])
    words = ("eval", home / "int3", "--against", home / "model", "--text", home / "text.txt", "--length", 48)
    assert "int3: numbers lose 5.0 times" in tiny.halfbyte(*words).out
    assert json.loads(tiny.halfbyte(*words, "--json").out)["models"][0]["findings"] == ["numbers lose 5.0 times"]
