"""AWQ and SmoothQuant: whatever they find, the block computes what it did, and the statistics are those of what its
matrices now read."""

import pytest
import torch

from halfbyte.grids import schemes
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.collect import collect
from halfbyte.models.walk import Walk
from halfbyte.transforms import TRANSFORMS, TransformSettings
from halfbyte.transforms.fold import Finder
from halfbyte.transforms.scale import FoldSite
from halfbyte.transforms.smoothquant import smoothquant
from models.families import FAMILIES

TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
SCHEMES = {"awq": "int3-g32", "smoothquant": "int8-tensor/int8-static", "smoothquant+awq": "int4-g32/int8-token"}


def uneven_block(family, folder):
    """The first block, its inputs and norms of channels of unlike size: something to gain."""
    checkpoint = Checkpoint.open(FAMILIES[family].save(folder / "model"))
    walk = Walk(checkpoint, TOKENS, torch.float32)
    walk.start()
    block = walk.blocks[0]
    block.load(walk.source)
    with torch.no_grad():
        for batch, hidden in enumerate(walk.inputs):
            walk.inputs[batch] = hidden * torch.linspace(0.1, 3, hidden.shape[-1])
        for t in block.tensors:
            if "norm" in t or ".ln_" in t:
                block.view(t).mul_(torch.linspace(0.2, 2, block.view(t).shape[0]))
    return block


def scaled_block(family, folder, is_quantized, transforms, alpha=None):
    """A block after transforms with its unrounded targets in place, the schemes, the statistics, what it returned
    before, and what was done."""
    block = uneven_block(family, folder)
    before = block.run(block.walk.inputs[1], 1)
    of = {w: schemes.parse(SCHEMES[transforms]) for w in block.weights if is_quantized(w)}
    statistics = collect(block, set(of), block.walk.inputs)
    done = []
    for name in transforms.split("+"):
        done += TRANSFORMS[name](block, Finder(), of, statistics, TransformSettings(alpha))
    for weight in of:
        block.put(weight, block.target(weight))
    return block, of, statistics, before, done


@pytest.mark.parametrize("transforms", SCHEMES)
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "granitemoe"),
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_moe", "deepseek_v3")),
    ],
)
def test_the_block_computes_the_same(tmp_path, family, transforms):
    block, of, statistics, before, done = scaled_block(family, tmp_path, lambda w: True, transforms)
    assert done
    assert all(fold["error"] < 1 for fold in done)
    after = block.run(block.walk.inputs[1], 1)
    assert (after - before).norm() < 1e-5 * before.norm()
    for weight, now in collect(block, set(of), block.walk.inputs).items():
        assert now.tokens == statistics[weight].tokens
        assert (now.hessian - statistics[weight].hessian).norm() < 1e-4 * now.hessian.norm(), weight.name
        for one, other in zip(now.activation_stats, statistics[weight].activation_stats, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-6, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("transforms", ["awq", "smoothquant"])
@pytest.mark.parametrize("kept", ["v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])
def test_what_stays_in_16_bits_takes_its_part(tmp_path, kept, transforms):
    block, of, _, before, done = scaled_block("llama", tmp_path, lambda w: not w.name.endswith(kept), transforms)
    assert done
    assert len(of) == 6
    after = block.run(block.walk.inputs[1], 1)
    assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_s_scale_is_the_paper_s(tmp_path, alpha):
    block = uneven_block("llama", tmp_path)
    read = []
    hook = block.module.mlp.gate_proj.register_forward_hook(lambda module, args, out: read.append(args[0]))
    block.run(block.walk.inputs[1], 1)
    hook.remove()
    of = dict.fromkeys(block.weights, schemes.parse("int8-channel/int8-token"))
    done = TRANSFORMS["smoothquant"](
        block, Finder(), of, collect(block, set(of), block.walk.inputs), TransformSettings(alpha)
    )
    assert {fold["alpha"] for fold in done} == {alpha}
    x = read[0].flatten(0, 1).abs().amax(0)
    w = torch.cat([block.module.mlp.gate_proj.weight, block.module.mlp.up_proj.weight]).abs().amax(0)
    ratio = block.scales.columns[next(w for w in block.weights if w.name.endswith("gate_proj"))] / (
        x**alpha / w ** (1 - alpha)
    )
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_the_search_for_alpha_leaves_no_trace(tmp_path):
    block = uneven_block("llama", tmp_path)
    of = dict.fromkeys(block.weights, schemes.parse("int8-tensor/int8-static"))
    statistics = collect(block, set(of), block.walk.inputs)
    known = {w: (s.hessian.clone(), *s.activation_stats) for w, s in statistics.items()}
    before = {t: block.view(t).clone() for t in block.tensors}
    folds = Finder().find(block)
    assert [smoothquant(FoldSite(block, fold, of, statistics), TransformSettings()) for fold in folds]
    assert all(torch.equal(block.view(t), value) for t, value in before.items())
    assert all(
        torch.equal(*pair)
        for w, s in statistics.items()
        for pair in zip(known[w], (s.hessian, *s.activation_stats), strict=True)
    )
    assert not block.scales.weights
    assert not block.activations


def test_smoothquant_leaves_folds_alone_whose_readers_inputs_stay_in_16_bits(tmp_path):
    block = uneven_block("llama", tmp_path)
    of = {
        w: schemes.parse("int8-channel/int8-token" if "self_attn" in w.name else "int8-channel") for w in block.weights
    }
    done = TRANSFORMS["smoothquant"](
        block, Finder(), of, collect(block, set(of), block.walk.inputs), TransformSettings(0.5)
    )
    assert sorted(fold["producer"].split(".", 3)[-1] for fold in done) == [
        "input_layernorm.weight",
        "self_attn.v_proj.weight",
    ]


def test_the_search_for_alpha_runs_the_block_six_times_for_a_fold_and_once_for_all(tmp_path, monkeypatch):
    block = uneven_block("llama", tmp_path)
    of = dict.fromkeys(block.weights, schemes.parse("int8-tensor/int8-static"))
    statistics = collect(block, set(of), block.walk.inputs)
    sites = [FoldSite(block, fold, of, statistics, reference) for reference in ([],) for fold in Finder().find(block)]
    runs, run = [], block.run
    monkeypatch.setattr(block, "run", lambda hidden, batch: runs.append(batch) or run(hidden, batch))
    assert all(0.4 <= smoothquant(site, TransformSettings()).about["alpha"] <= 1 for site in sites)
    assert len(runs) == 6 * len(sites) + 1
