"""What parts give back, against Transformers' own models with these parts put back by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.types import Blame

LENGTH, WINDOWS = 48, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("blame")
    tiny.make(home / "model", num_hidden_layers=3)
    tiny.text(home / "text.txt", 200)
    halfbyte.quantize(home / "model", home / "int3", method="nearest", grid="int3-g64", head=True)
    halfbyte.quantize(home / "model", home / "w8a8", method="nearest", grid="int8-channel/int8-token")
    calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 48}
    halfbyte.quantize(home / "model", home / "awq", method="awq", grid="int3-g64", calibration=calibration)
    return home


def blame(home: Path, name: str, **options) -> Blame:
    return halfbyte.blame(home / name, home / "model", str(home / "text.txt"), LENGTH, WINDOWS, **options)


@torch.no_grad()
def logits(home: Path, tensors: dict[str, torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(home / "model")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(tensors)
    return model.eval()(windows).logits[:, :-1].double().log_softmax(-1)


def test_given_back_is_the_difference_of_divergences(home):
    original, quantized = Checkpoint(home / "model"), Checkpoint(home / "int3")
    theirs = {name: original.read(name).float() for name in original.tensors()}
    ours = {name: quantized.read(name).float() for name in quantized.tensors()}
    letters = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    ids = [letters.index(c) for c in (home / "text.txt").read_text().replace(" ", "Ġ")]
    windows = torch.tensor(ids[: LENGTH * WINDOWS]).view(WINDOWS, LENGTH)
    reference = logits(home, theirs, windows)

    def divergence(*put_back: str) -> float:
        mixed = {name: theirs[name] if any(p in name for p in put_back) else ours[name] for name in ours}
        return float((reference.exp() * (reference - logits(home, mixed, windows))).sum(-1).mean())

    found = blame(home, "int3", blocks=1)
    whole = divergence()
    assert found.kl[0] == pytest.approx(whole, rel=1e-3)
    kinds = [part.kind for part in found.parts]
    assert (kinds.count("block"), kinds.count("head"), kinds.count("weight")) == (3, 1, 7)
    for part in found.parts:
        wanted = whole - divergence({"head": "lm_head"}.get(part.name, part.name))
        assert part.kl[0] == pytest.approx(wanted, rel=1e-2, abs=1e-5), part.name
    blocks = [part for part in found.parts if part.kind == "block"]
    assert blocks == sorted(blocks, key=lambda part: -part.kl[0])
    assert all(part.name.startswith(f"{blocks[0].name}.") for part in found.parts if part.kind == "weight")


def test_errors_that_the_run_reported_stand_beside(home):
    reported = {row.name: row.error for row in halfbyte.inspect(home / "int3").weights}
    for part in blame(home, "int3", blocks=1).parts:
        if part.kind == "weight":
            assert part.error == reported[part.name]
        elif part.kind == "block":
            assert part.error == max(error for name, error in reported.items() if name.startswith(f"{part.name}."))


def test_a_whole_block_put_back_runs_without_rounded_activations(home):
    """With every block put back, W8A8 of linears alone would be the original again; each one gives back its share."""
    found = blame(home, "w8a8", blocks=3)
    blocks = [part.kl[0] for part in found.parts if part.kind == "block"]
    assert sum(blocks) == pytest.approx(found.kl[0], rel=0.5)
    assert all(kl > 0 for kl in blocks)


def test_weights_that_share_a_scale_are_put_back_together(home):
    """One of them alone would break the model: what it gives back would be far below zero."""
    folds = json.loads((home / "awq" / "report.json").read_text())["folds"]
    assert folds
    found = blame(home, "awq", blocks=3)
    assert any(", " in part.name for part in found.parts)
    assert min(part.kl[0] for part in found.parts) > -found.kl[0]


def test_folds_that_nobody_tells_of_leave_blocks_whole(home, tmp_path):
    shutil.copytree(home / "awq", tmp_path / "awq")
    (tmp_path / "awq" / "report.json").unlink()
    found = halfbyte.blame(tmp_path / "awq", home / "model", str(home / "text.txt"), LENGTH, WINDOWS, blocks=3)
    norms = {fold["producer"] for fold in json.loads((home / "awq" / "report.json").read_text())["folds"]}
    rescaled = {name.rpartition(".layers.")[2].split(".")[0] for name in norms if "norm" in name}
    assert rescaled
    weights = [part.name for part in found.parts if part.kind == "weight"]
    assert not any(name.rpartition(".layers.")[2].split(".")[0] in rescaled for name in weights)


@pytest.mark.slow
def test_slices_change_nothing(home, monkeypatch):
    from halfbyte.evaluation import divergence

    whole = blame(home, "int3")
    monkeypatch.setattr(divergence, "HIDDEN_BYTES", 1)
    sliced = blame(home, "int3")
    for mine, its in zip(sliced.parts, whole.parts, strict=True):
        assert mine.name == its.name
        assert mine.kl == pytest.approx(its.kl, rel=1e-3, abs=1e-6)


def test_what_is_the_same_is_not_blamed(home):
    tiny.refused(
        tiny.halfbyte(
            "blame", home / "model", "--against", home / "model", "--text", home / "text.txt", "--length", 48
        ),
        "nothing to blame",
    )


def test_the_command_shows_and_records_it(home):
    said = tiny.halfbyte(
        "blame", home / "int3", "--against", home / "model", "--text", home / "text.txt", "--length", LENGTH
    )
    assert said.code == 0, said.err
    written = json.loads((home / "int3" / "report.json").read_text())["blame"]
    most = next(part for part in written["parts"] if part["kind"] == "block")
    assert f"{most['name']} (block) costs most" in said.out
    assert f"{most['kl'][0]:.5f}" in said.out
