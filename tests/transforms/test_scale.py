"""AWQ: whatever it finds, the block computes what it did, and the statistics are those of what its matrices now read."""

import pytest
import torch

from halfbyte import grids
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.walk import Walk
from halfbyte.transforms.fold import Finder
from halfbyte.transforms.scale import awq
from models.families import FAMILIES

TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
GRID = grids.parse("int3-g32")


def scaled_block(family, folder, is_quantized):
    """A block after AWQ with its unrounded targets in place, the grids, the statistics, what it returned before, and what was done."""
    checkpoint = Checkpoint.open(FAMILIES[family].save(folder / "model"))
    walk = Walk(checkpoint, TOKENS, torch.float32)
    walk.start()
    block = walk.blocks[0]
    block.load(checkpoint)
    with torch.no_grad():
        walk.hidden[:] = [h * torch.linspace(0.1, 3, h.shape[-1]) for h in walk.hidden]  # channels of unlike size: something to gain
        for t in block.tensors:
            if "norm" in t or ".ln_" in t:
                block.view(t).mul_(torch.linspace(0.2, 2, block.view(t).shape[0]))
    before = block.run(walk.hidden[1], 1)
    of = {w: GRID for w in block.weights if is_quantized(w)}
    statistics = block.collect(set(of))
    done = awq(block, Finder(), of, statistics)
    for weight in of:
        block.put(weight, block.target(weight))
    return block, of, statistics, before, done


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "qwen3_moe", "granitemoe", "deepseek_v3"])
def test_the_block_computes_the_same(tmp_path, family):
    block, of, statistics, before, done = scaled_block(family, tmp_path, lambda w: True)
    assert done
    assert all(fold["error"] < 1 for fold in done)
    after = block.run(block.walk.hidden[1], 1)
    assert (after - before).norm() < 1e-5 * before.norm()
    for weight, now in block.collect(set(of)).items():
        assert now.tokens == statistics[weight].tokens
        assert (now.hessian - statistics[weight].hessian).norm() < 1e-4 * now.hessian.norm(), weight.name


@pytest.mark.parametrize("kept", ["v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])
def test_what_stays_in_16_bits_takes_its_part(tmp_path, kept):
    block, of, _, before, done = scaled_block("llama", tmp_path, lambda w: not w.name.endswith(kept))
    assert done
    assert len(of) == 6
    after = block.run(block.walk.hidden[1], 1)
    assert (after - before).norm() < 1e-5 * before.norm()
