"""Losses of single weights that are measured: those of Transformers, kept as they are found, and used by a budget."""

import json

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte.budget import measured
from halfbyte.budget.ledger import Ledger
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids.schemes import parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.recipe import method_named
from halfbyte.solvers import SOLVERS

GRIDS = ("int3-g32", "int6-g32")
TOKENS = torch.randint(5, 250, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def source(tmp_path_factory, request):
    return tiny.make(tmp_path_factory.mktemp("measured") / "model", tie_word_embeddings=request.param)


@torch.no_grad()
def by_transformers(source, weight, grid) -> float:
    """With one weight rounded to nearest, on the last window."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    said = model(TOKENS[-1:]).logits[:, :-1].log_softmax(-1)
    parameter = dict(model.named_parameters())[weight.tensor]
    w = Checkpoint.open(source).read_weight(weight)
    rounded = SOLVERS["nearest"](w, parse(grid), None).decode()
    parameter.copy_(rounded if weight.block else rounded.to(w.dtype))
    now = model(TOKENS[-1:]).logits[:, :-1].log_softmax(-1)
    return (said.exp() * (said - now)).sum(-1).mean().item()


def test_losses_are_those_of_transformers(source, tmp_path):
    checkpoint = Checkpoint.open(source)
    ends = ("1.mlp.up_proj", "v_proj")
    some = [w for w in checkpoint.weights(embedding=True) if not w.block or w.name.endswith(ends)]
    wanted = {weight: {grid: parse(grid) for grid in GRIDS} for weight in some}
    ledger = Ledger(tmp_path / "losses.jsonl", "x")
    measured.measure(checkpoint, TOKENS, wanted, method_named("nearest"), ledger)
    for weight in some:
        for grid in GRIDS:
            expected = by_transformers(source, weight, grid)
            assert ledger.losses[weight.name][grid] == pytest.approx(expected, rel=2e-3, abs=1e-7), (weight.name, grid)


def make(source, out, **words):
    calibration = {"source": str(tiny.text(out.parent / "text.txt", 400)), "samples": 4, "length": 48}
    words = {"bits": 8, "to": "compressed-tensors", "candidates": GRIDS, **words}
    return halfbyte.quantize(
        source, out, sensitivity="measured", calibration=calibration, sensitivities=out.parent / "costs.jsonl", **words
    )


def test_a_run_that_was_killed_goes_on_with_what_it_had_found(source, tmp_path, monkeypatch):
    tried, calls = measured._tried, []

    def counted(block, trials, *rest):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(block.name)
        return tried(block, trials, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(measured, "_tried", counted)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out")
    known = (tmp_path / "costs.jsonl").read_bytes()
    assert known.count(b"\n") > 1
    assert not (tmp_path / "out").exists()
    report = make(source, tmp_path / "out")
    assert (tmp_path / "costs.jsonl").read_bytes().startswith(known)
    assert report.budget.sensitivity == "measured"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["budget"]["sensitivity"] == "measured"
    monkeypatch.setattr(measured, "Walk", None)  # another budget runs nothing
    assert make(source, tmp_path / "other", bits=9, dry_run=True).budget.predicted_kl < report.budget.predicted_kl


def test_predicted_losses_are_not_taken_for_measured_ones(source, tmp_path):
    make(source, tmp_path / "out", dry_run=True)
    with pytest.raises(BadRequest, match="or kind of sensitivity"):
        halfbyte.quantize(
            source, tmp_path / "b", bits=8, to="compressed-tensors", sensitivities=tmp_path / "costs.jsonl",
            calibration={"source": str(tmp_path / "text.txt"), "samples": 4, "length": 48},
        )  # fmt: skip
    with pytest.raises(UnknownName, match="sensitivity"):
        halfbyte.quantize(source, tmp_path / "b", bits=8, sensitivity="guessed")
