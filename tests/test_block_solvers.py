"""A solver of whole blocks gets what it needs: the block, what it reads, what it returns in full precision, and
gradients."""

import pytest
import torch

import halfbyte
import tiny
from halfbyte import block_solvers, recipe
from halfbyte.block_solvers import Solution
from halfbyte.grids.quantized import Quantized
from halfbyte.solvers import SOLVERS
from models.families import FAMILIES


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> dict:
    return {"source": str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt")), "samples": 8, "length": 32}


def losses_of(task, values) -> torch.Tensor:
    """Squared error of what the block returns with other weights."""
    lost = [
        (task.block.run_with(values, task.inputs[batch], batch).float() - task.targets[batch].float()).square().mean()
        for batch in task.batches
    ]
    return torch.stack(lost).mean()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_scales_are_tuned_by_gradients_through_the_block(family, calibration, tmp_path, monkeypatch):
    """A factor for every row of every weight, learned so that the block returns what it returned."""
    losses = []

    def tuned(task):
        rounded = {
            group[0]: SOLVERS["nearest"](task.block.target(group[0]), task.schemes[group[0]].weight)
            for group in task.fused_groups
        }
        decoded = {weight: q.decode() for weight, q in rounded.items()}
        gain = {weight: torch.ones(weight.shape[0], 1, requires_grad=True) for weight in rounded}
        optimizer = torch.optim.Adam(gain.values(), lr=2e-3)
        steps = []
        for _ in range(6):
            loss = losses_of(task, {weight: w * gain[weight] for weight, w in decoded.items()})
            optimizer.zero_grad()
            loss.backward()
            assert all(g.grad is not None and g.grad.isfinite().all() for g in gain.values())
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
        for weight, q in rounded.items():
            scale = q.params["scale"] * gain[weight].detach()
            yield Solution(
                [weight], Quantized(q.grid, q.codes, q.params | {"scale": scale.to(q.params["scale"].dtype)})
            )

    monkeypatch.setitem(recipe.PARTS, "tuned", recipe.Method((), "tuned", calibrated=True, full_precision=True))
    monkeypatch.setitem(block_solvers.BLOCK_SOLVERS, "tuned", tuned)
    source = FAMILIES[family].save(tmp_path / "model")
    tiny.tokenizer(adds_bos=False).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    report = halfbyte.quantize(
        source,
        tmp_path / "out",
        method="tuned",
        grid="int3-g32",
        calibration=calibration,
        engine="none",
        to="compressed-tensors",
    )
    assert len(losses) == 2
    assert all(steps[-1] < 0.98 * steps[0] for steps in losses)
    assert len(report.weights) > 6


def test_a_method_that_did_not_ask_for_the_full_precision_model_has_no_targets(calibration, tmp_path, monkeypatch):
    def greedy(task):
        with pytest.raises(ValueError, match="full_precision"):
            _ = task.targets
        yield from block_solvers.per_matrix(recipe.PARTS["gptq"])(task)

    monkeypatch.setitem(recipe.PARTS, "greedy", recipe.Method((), "greedy", calibrated=True))
    monkeypatch.setitem(block_solvers.BLOCK_SOLVERS, "greedy", greedy)
    source = tiny.make(tmp_path / "model")
    for method in ("greedy", "gptq"):
        halfbyte.quantize(source, tmp_path / method, method=method, calibration=calibration, engine="none")
    assert tiny.weights(tmp_path / "greedy") == tiny.weights(tmp_path / "gptq")
