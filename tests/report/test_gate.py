"""Limits, both directions of the divergence, positions, and the noise floor."""

import json

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import gate

LENGTH, WINDOWS = 48, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("gate")
    tiny.make(home / "model")
    tiny.text(home / "text.txt", 200)
    tiny.text(home / "other.txt", 200, seed=1)
    halfbyte.quantize(home / "model", home / "int3", method="nearest", grid="int3-g64")
    return home


def command(home, *words):
    return tiny.halfbyte(
        *("eval", home / "int3", "--against", home / "model", "--text", home / "text.txt", "--length", LENGTH),
        *("--windows", WINDOWS, *words),
    )


@pytest.fixture(scope="module")
def measured(home):
    return halfbyte.evaluate([home / "int3"], home / "model", str(home / "text.txt"), LENGTH, WINDOWS, noise_floor=True)


def test_a_gate_that_holds_and_one_that_does_not(home, measured):
    kl = measured.models[0].kl
    assert command(home, "--gate", f"kl={2 * kl},flips=100%").code == 0
    broken = command(home, "--gate", f"kl={kl / 2},flips=1")
    assert broken.code == 1
    assert "gate kl" in broken.out
    assert "does not hold" in broken.out
    assert "gate flips" in broken.out
    gates = json.loads(command(home, "--gate", f"kl={kl / 2}", "--json").out)["gates"]
    assert [(g["name"], g["holds"], g["value"]) for g in gates] == [("kl", False, pytest.approx(kl))]


@pytest.mark.parametrize("words", ["kl", "kl=", "kl=x", "kl=-1", "kl=nan", "flaps=1%", ""])
def test_other_words_are_refused_before_anything_runs(words):
    tiny.refused(
        tiny.halfbyte("eval", "nowhere", "--against", "nowhere", "--gate", words or ","), "--gate takes limits"
    )


def test_percent(measured):
    row = measured.models[0]
    assert [limit.value for limit in gate.limits("flips=2%,perplexity=0.5")] == [0.02, 0.5]
    rise = row.perplexity / measured.reference.perplexity - 1
    assert gate.MEASURES["perplexity"].of_text(row) == pytest.approx(rise, rel=1e-3)


@torch.no_grad()
def test_reverse_divergence_and_positions_are_transformers(home, measured):
    config = transformers.AutoConfig.from_pretrained(home / "model")
    letters = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    ids = [letters.index(c) for c in (home / "text.txt").read_text().replace(" ", "Ġ")]
    windows = torch.tensor(ids[: LENGTH * WINDOWS]).view(WINDOWS, LENGTH)
    said = []
    for name in ("model", "int3"):
        checkpoint = Checkpoint(home / name)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict({t: checkpoint.read(t).float() for t in checkpoint.tensors()})
        said.append(model.eval()(windows).logits[:, :-1].double().log_softmax(-1))
    p, q = said
    row = measured.models[0]
    assert row.reverse_kl[0] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-3)
    kl = (p.exp() * (p - q)).sum(-1)
    assert row.kl_by_position[0].first == 0
    assert row.kl_by_position[-1].last == LENGTH - 2
    for part in row.kl_by_position:
        assert part.kl == pytest.approx(float(kl[:, part.first : part.last + 1].mean()), rel=1e-3)


@torch.no_grad()
def test_the_noise_floor_is_the_original_in_bfloat16(home, measured):
    floor = measured.noise_floor
    assert 0 < floor.kl < measured.models[0].kl / 10
    assert [row.path for row in measured.models] == [str(home / "int3")]


def test_texts_by_name(home):
    said = command(home, "--text", f"zz={home / 'other.txt'}")
    both = json.loads(command(home, "--text", f"zz={home / 'other.txt'}", "--json").out)
    assert [(one["text_name"], one["text"]) for one in both] == [
        (None, str(home / "text.txt")),
        ("zz", str(home / "other.txt")),
    ]
    lines = [line.split() for line in said.out.splitlines() if line.startswith("int3") and "±" in line]
    assert {(words[1], float(words[3])) for words in lines[-2:]} == {
        (name, float(f"{one['models'][0]['kl']:.5f}")) for name, one in zip(("text.txt", "zz"), both, strict=True)
    }
    assert float(lines[-2][3]) >= float(lines[-1][3])
    (home / "a=b.txt").write_text((home / "text.txt").read_text())
    whole = json.loads(command(home, "--text", home / "a=b.txt", "--json").out)
    assert whole[1]["text_name"] is None


def test_several_texts_are_measured_one_by_one(home):
    both = json.loads(command(home, "--text", home / "other.txt", "--json").out)
    assert [one["text"] for one in both] == [str(home / "text.txt"), str(home / "other.txt")]
    alone = json.loads(command(home, "--json").out)
    assert alone["models"] == both[0]["models"] != both[1]["models"]
