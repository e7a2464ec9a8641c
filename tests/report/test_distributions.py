"""What a report says of how weights and activations are spread, beside numpy's own percentiles."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import halfbyte
import outliers
import tiny
from halfbyte.evaluation.divergence import by_position
from halfbyte.grids.activations import ActivationStats
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.distributions import SHARES, activation_distribution, distribution, sample
from halfbyte.solvers.statistics import Statistics


def test_percentiles_are_those_of_numpy():
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) ** 3
    whole = distribution([sample(w, w.numel())])
    few = distribution([sample(chunk, 1 << 13) for chunk in w.split(64)])
    assert whole
    assert few
    for name, share in SHARES.items():
        exact = np.quantile(w.numpy(), share, method="lower")
        assert whole[name] == pytest.approx(exact, rel=1e-4, abs=1e-6)
        assert few[name] == pytest.approx(exact, rel=0.25, abs=0.01)
    for found in (whole, few):  # extremes are exact whatever is looked at
        assert (found.low, found.high) == pytest.approx((w.min().item(), w.max().item()), rel=1e-4)


def test_few_tokens_are_those_of_every_part():
    statistics, x = Statistics(16), torch.randn(4, 320, 16)
    for part in x:
        statistics.add(part)
    seen, few = statistics.activation_stats, statistics.sample(5 * 16)
    assert torch.equal(few.rows, seen.rows[::8])
    assert torch.equal(few.low, x.amin((0, 1)))
    assert torch.equal(few.high, x.amax((0, 1)))


def test_planted_outlier_channels_are_named(tmp_path):
    plain = tiny.make(tmp_path / "plain")
    twin = outliers.twin(plain, tmp_path / "twin")
    calibration = {"source": str(tiny.text(tmp_path / "text.txt")), "samples": 4, "length": 64}
    made = [halfbyte.quantize(m, tmp_path / f"{m.name}-4", calibration=calibration) for m in (plain, twin)]
    name = "model.layers.0.self_attn.q_proj"
    for report, model in zip(made, (plain, twin), strict=True):
        row = next(row for row in report.weights if row.name == name)
        w = Checkpoint(model).read(f"{name}.weight").float()
        assert row.distribution
        assert (row.distribution.low, row.distribution.high) == pytest.approx((w.min().item(), w.max().item()), 1e-4)
    rows = [next(row for row in report.weights if row.name == name).activation_distribution for report in made]
    norms = [Checkpoint(m).read("model.layers.0.input_layernorm.weight").float() for m in (plain, twin)]
    planted = torch.nonzero(norms[0] != norms[1])[:, 0].tolist()
    assert all(rows)
    assert not rows[0].outliers
    assert sorted(one.channel for one in rows[1].outliers) == planted
    assert all(one.largest >= 8 * rows[1].median_channel for one in rows[1].outliers)


def test_activations_that_overflow_are_not_told_of():
    low, high = torch.zeros(4), torch.tensor([1.0, torch.inf, 1.0, 1.0])
    assert activation_distribution(ActivationStats(low, high, torch.ones(2, 4))) is None


def test_divergence_by_position_adds_up():
    kl = torch.rand(3, 63)
    stretches = by_position(kl, first_scored=5)
    assert (stretches[0]["first"], stretches[-1]["last"]) == (5, 67)
    assert all(a["last"] + 1 == b["first"] for a, b in pairwise(stretches))
    counts = [s["last"] - s["first"] + 1 for s in stretches]
    mean = sum(s["kl"] * count for s, count in zip(stretches, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(kl.mean().item())
    assert len(by_position(kl[:, :3], first_scored=0)) == 3
