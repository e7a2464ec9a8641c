"""The whole model is tuned to the original's predictions: codes stay, and the file is what was tuned."""

from pathlib import Path

import pytest
import torch

import halfbyte
import tiny
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.polish import tuning
from halfbyte.polish.tuning import Tuning
from halfbyte.recipe import Calibration
from halfbyte.report.types import Report
from halfbyte.run import Run
from models.families import FAMILIES

CALIBRATION = {"samples": 16, "length": 48}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("polish")
    tiny.make(home / "model", hidden_size=256)
    tiny.text(home / "text.txt")
    return home


def quantized(home: Path, out: Path, method: str, model: str | Path = "model", **words) -> Report:
    calibration = {"source": str(home / "text.txt"), **CALIBRATION}
    report = halfbyte.quantize(home / model, out, method=method, calibration=calibration, engine="none", **words)
    assert isinstance(report, Report)
    return report


def divergence(out: Path, model: Path, windows: torch.Tensor) -> float:
    """Of the file, as a user loads it."""
    with torch.no_grad():
        p, q = (
            halfbyte.load(path, torch.float32)(windows, use_cache=False).logits.log_softmax(-1) for path in (model, out)
        )
    return (p.exp() * (p - q)).sum(-1).mean().item()


CASES = [
    ("int2-g32-asym", "compressed-tensors"),
    ("int3-g128", "gptq"),
    ("nf4-g64-double", "bitsandbytes"),
    ("nvfp4", "compressed-tensors"),
    ("Q2_K", "gguf"),
    ("IQ4_XS", "gguf"),
    ("IQ2_XXS", "gguf"),
    ("MXFP4", "gguf"),
    ("int3-g32/int8-token", "compressed-tensors"),
]
FAST = {"int2-g32-asym", "Q2_K"}


@pytest.mark.parametrize(
    ("grid", "to"), [case if case[0] in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_file_is_nearer_to_the_original_and_its_codes_are_the_same(home, tmp_path, monkeypatch, grid, to):
    monkeypatch.setattr("halfbyte.models.student.KEPT", 264)
    end = ".gguf" if to == "gguf" else ""
    plain, polished = tmp_path / f"plain{end}", tmp_path / f"polished{end}"
    before = quantized(home, plain, "gptq", grid=grid, to=to)
    after = quantized(home, polished, "gptq+polish", grid=grid, to=to)
    assert after.polish is not None
    assert after.polish.kl < after.polish.kl_before
    mine, theirs = Checkpoint.open(polished), Checkpoint.open(plain)
    assert mine.quantized.keys() == theirs.quantized.keys()
    for name in mine.quantized:
        q, first = mine.read_quantized(name), theirs.read_quantized(name)
        assert torch.equal(q.codes, first.codes)
        assert {n for n, p in q.params.items() if not torch.equal(p, first.params[n])} <= {*q.grid.numbers(q.params)}
    if "/" not in grid:  # the report's figures are those of the files
        tokens = calibrate.calibration(
            Checkpoint.open(home / "model"),
            Calibration(source=str(home / "text.txt"), **CALIBRATION),
        ).tokens
        held_out = tuning.shuffled(tokens)[-after.polish.held_out :]
        for path, kl in ((plain, after.polish.kl_before), (polished, after.polish.kl)):
            assert divergence(path, home / "model", held_out) == pytest.approx(kl, rel=0.02)
    changed = [row.error != old.error for row, old in zip(after.weights, before.weights, strict=True)]
    assert any(changed)
    assert all(mine.read(t).float().isfinite().all() for t in after.polish.unquantized)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3"])
def test_other_families(home, tmp_path, family):
    model = FAMILIES[family].save(tmp_path / "model")
    report = quantized(
        home, tmp_path / "out", "awq+gptq+polish" if family == "mixtral" else "polish", model, grid="int2-g32"
    )
    assert report.polish is not None
    assert report.polish.kl < report.polish.kl_before


def test_a_run_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(home, tmp_path, monkeypatch):
    words = {"grid": "int2-g32"}
    whole = quantized(home, tmp_path / "whole", "polish", **words)
    move, rewrite = Tuning._move, Run.write_unquantized
    cuts = iter((3, 9, 17))
    moves = []

    def cut(self):
        if self.step == self.until:
            raise KeyboardInterrupt
        moves.append(self.step)
        move(self)

    for until in cuts:
        monkeypatch.setattr(Tuning, "until", until, raising=False)
        monkeypatch.setattr(Tuning, "_move", cut)
        with pytest.raises(KeyboardInterrupt):
            quantized(home, tmp_path / "out", "polish", **words)
    assert len(moves) < 3 + 9 + 17  # what was done is not done again
    monkeypatch.setattr(Tuning, "_move", move)

    def torn(self, tensor, value, dtype=None):
        if dtype is not None:
            raise KeyboardInterrupt
        rewrite(self, tensor, value)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_unquantized", torn)
        with pytest.raises(KeyboardInterrupt):
            quantized(home, tmp_path / "out", "polish", **words)
    with tiny.cut_after_each_record(monkeypatch), pytest.raises(KeyboardInterrupt):
        quantized(home, tmp_path / "out", "polish", **words)
    report = quantized(home, tmp_path / "out", "polish", **words)
    assert tiny.weights(tmp_path / "out") == tiny.weights(tmp_path / "whole")
    assert report.polish == whole.polish
    assert report.weights == whole.weights
    assert not list((tmp_path / "out").glob(".scratch*"))


def test_one_window_cannot_judge_itself(home, tmp_path):
    with pytest.raises(halfbyte.HalfbyteError, match="--samples 2 or more"):
        halfbyte.quantize(
            home / "model",
            tmp_path / "out",
            method="polish",
            calibration={"source": str(home / "text.txt"), "samples": 1},
        )
