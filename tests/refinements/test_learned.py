"""Rounding and scales that are learned: the block misses by less what it returned, and a file holds it."""

from collections.abc import Sequence

import pytest
import torch
from gguf import GGUFReader

import halfbyte
import tiny
from halfbyte import refinements
from halfbyte.block_solvers import BlockTask, Solution
from halfbyte.grids.grid import SteppedGrid
from halfbyte.refinements import learning
from halfbyte.solvers.statistics import FEWEST_TOKENS
from models.families import FAMILIES

STEPPED = ["int2-g32-asym", "int4-g32", "nf4-g64", "mxfp4", "nvfp4", "fp8-e4m3-channel"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> dict:
    return {"source": str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt")), "samples": 8, "length": 32}


@pytest.fixture
def few_steps(monkeypatch) -> None:
    monkeypatch.setattr(learning, "STEPS", 40)


def save(family: str, folder) -> object:
    source = FAMILIES[family].save(folder)
    tiny.tokenizer(adds_bos=False).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return source


def missed(task: BlockTask, solutions: Sequence[Solution]) -> float:
    """By how much the block would miss its targets with these solutions."""
    values = {}
    for solution in solutions:
        parts = solution.q.decode().split([weight.shape[0] for weight in solution.weights])
        values |= dict(zip(solution.weights, parts, strict=True))
    lost = [
        (task.block.run_with(values, task.inputs[batch], batch).float() - task.targets[batch].float()).square().mean()
        for batch in task.batches
    ]
    return torch.stack(lost).mean().item()


def watched(monkeypatch) -> list[tuple[float, float]]:
    """What each block misses by, before and after."""
    errors: list[tuple[float, float]] = []

    def watch(task: BlockTask, solutions: Sequence[Solution]) -> list[Solution]:
        before = {weight: task.block.weight(weight).clone() for weight in task.block.weights}
        refined = learning.learned(task, solutions)
        assert all(torch.equal(task.block.weight(weight), value) for weight, value in before.items())
        for solution, better in zip(solutions, refined, strict=True):
            require_steps(solution, better)
        errors.append((missed(task, solutions), missed(task, refined)))
        return refined

    monkeypatch.setitem(refinements.REFINEMENTS, "learned", watch)
    return errors


def require_steps(solution: Solution, better: Solution) -> None:
    """Each weight went one level at most, and what is shared by others than weights of a group stayed."""
    grid = solution.q.grid
    assert isinstance(grid, SteppedGrid)
    ranks = [grid.ladder.ranks[s.q.codes.int()].int() for s in (solution, better)]
    assert (ranks[1] - ranks[0]).abs().max() <= (better.tokens >= FEWEST_TOKENS)
    assert better.q.params.keys() == solution.q.params.keys()
    assert better.weights == solution.weights
    assert ("not learned" in better.note) == (better.tokens < FEWEST_TOKENS)
    for name in {"zero", "divisor", "nested", "offset"} & better.q.params.keys():
        assert torch.equal(better.q.params[name], solution.q.params[name])


@pytest.mark.parametrize("grid", STEPPED)
def test_a_block_misses_by_less_on_every_grid(grid, calibration, few_steps, tmp_path, monkeypatch):
    errors = watched(monkeypatch)
    words = {"grid": grid, "engine": "none", "calibration": calibration}
    halfbyte.quantize(save("llama", tmp_path / "model"), tmp_path / "out", method="learned", **words)
    assert len(errors) == 2
    assert all(after < 0.95 * before for before, after in errors)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen3_moe"])
def test_experts_and_transposed_weights(family, calibration, few_steps, tmp_path, monkeypatch):
    errors = watched(monkeypatch)
    words = {"grid": "int3-g32", "engine": "none", "calibration": calibration}
    halfbyte.quantize(save(family, tmp_path / "model"), tmp_path / "out", method="gptaq+learned", **words)
    assert all(after < 0.95 * before for before, after in errors)


def test_what_is_rounded_jointly_stays_as_it_was(calibration, few_steps, tmp_path):
    source = tiny.make(tmp_path / "model", hidden_size=256, intermediate_size=256)
    words = {"grid": "IQ2_XXS", "pure": True, "calibration": calibration}
    for method in ("gptq", "learned"):
        report = halfbyte.quantize(source, tmp_path / f"{method}.gguf", method=method, **words)
    assert all("not learned" in weight.note for weight in report.weights if ".layers." in weight.name)
    plain, same = (GGUFReader(tmp_path / f"{method}.gguf").tensors for method in ("gptq", "learned"))
    assert all((a.data == b.data).all() for a, b in zip(plain, same, strict=True))


def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(calibration, few_steps, tmp_path, monkeypatch):
    source = tiny.make(tmp_path / "model", num_hidden_layers=3)
    command = ["quantize", source, "--method", "learned", "--grid", "int4-g32", "--calibration", calibration["source"]]
    command += ["--samples", "3", "--length", "32", "-o"]
    with tiny.cut_after_each_record(monkeypatch):
        assert tiny.halfbyte(*command, tmp_path / "out").code == 130
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        assert tiny.halfbyte(*command, tmp_path / name).code == 0
    assert tiny.weights(tmp_path / "out") == tiny.weights(tmp_path / "whole")
