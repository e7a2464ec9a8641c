"""Folds are kept only where they are exact. Which ones families have is in tests/models/test_architectures.py."""

import re

import pytest
import torch

from halfbyte import grids
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.walk import Walk
from halfbyte.transforms.fold import Finder, Producer, Proof, row_maps
from halfbyte.transforms.scale import FoldSite
from models.every import EVERY
from models.families import EXPERT_UP_DOWN, EXPERTS, FAMILIES, LLAMA, Family

TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
GRID = grids.parse("int8-channel")


def first_block(family, folder, tokens=TOKENS):
    checkpoint = Checkpoint.open(family.save(folder / "model"))
    walk = Walk(checkpoint, tokens, checkpoint.dtype)
    walk.start()
    walk.blocks[0].load(walk.source)
    return walk.blocks[0]


def called(tensor, block):
    return re.sub(r"\.\d+\.", ".*.", tensor.removeprefix(f"{block.name}.").removesuffix(".weight"))


def found(block):
    folds = {}
    for fold in Finder().find(block):
        folds.setdefault(called(fold.producer.tensor, block), set()).update(
            called(m.tensor, block) for m in fold.readers
        )
    return folds


def as_sets(folds):
    return {name: set(readers.split()) for name, readers in folds.items()}


@pytest.fixture
def llama(tmp_path):
    return first_block(FAMILIES["llama"], tmp_path)


def prove(block, name, rows=None, offset=False):
    return Proof(block).prove([Producer(f"{block.name}.{name}.weight", None, rows, offset)], set())


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mlp.gate_proj", range(128)),  # SiLU lies between
        ("self_attn.q_proj", range(64)),  # scales what k is multiplied by
        ("self_attn.o_proj", range(64)),  # the residual takes it in
        ("mlp.down_proj", range(64)),
        ("self_attn.v_proj", [*range(32), *range(32)]),  # heads of v serve query heads in another order
    ],
)
def test_a_linear_that_nothing_makes_up_for_is_no_producer(llama, name, rows):
    assert prove(llama, name, tuple(rows)) == []


def test_a_norm_is_taken_as_what_it_is(llama):
    assert prove(llama, "input_layernorm", offset=False)
    assert prove(llama, "input_layernorm", offset=True) == []


def test_matrices_of_one_shape_are_not_mistaken_for_each_other(tmp_path):
    square = Family("llama", LLAMA, {"intermediate_size": 64, "num_key_value_heads": 4})
    assert found(first_block(square, tmp_path)) == as_sets(LLAMA)


@pytest.mark.parametrize("share", [1, 0.03])
def test_a_fold_that_something_else_would_notice_is_rejected(llama, share):
    mlp = llama.module.mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + share * x  # reads the norm, and is no matrix
    assert found(llama) == {
        name: readers for name, readers in as_sets(LLAMA).items() if name != "post_attention_layernorm"
    }


def test_a_fold_that_held_in_one_block_is_proved_again_in_the_next(llama):
    finder = Finder()
    finder.find(llama)
    mlp = llama.module.mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x
    assert "post_attention_layernorm" not in {called(f.producer.tensor, llama) for f in finder.find(llama)}


def test_the_search_leaves_no_trace(llama):
    before = {t: llama.view(t).clone() for t in llama.tensors}
    assert Finder().find(llama)
    assert all(torch.equal(llama.view(t), value) for t, value in before.items())


@pytest.mark.slow
def test_a_table_of_integers_is_no_matrix(tmp_path):
    """DeepSeek-V4's first layers look up in one which experts a token is sent to."""
    block = first_block(EVERY["deepseek_v4"], tmp_path)
    tables = {t for t in block.tensors if not block.view(t).is_floating_point()}
    assert tables
    assert not tables & {m.tensor for m, _ in block.matrices()}
    assert Finder().find(block)


def test_experts_that_the_probe_does_not_reach_take_the_scale_too(tmp_path):
    config = {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}
    block = first_block(Family("qwen3_moe", {}, config), tmp_path, TOKENS[:1, :8])
    reached = {m.tensor for group in block.groups() for m in group if "experts" in m.tensor}
    assert len(reached) < 3 * 16
    assert found(block)["post_attention_layernorm"] == {"mlp.gate", *EXPERTS.split()}
    folds = [f for f in Finder().find(block) if called(f.producer.tensor, block) in EXPERT_UP_DOWN]
    assert len({f.producer.tensor for f in folds}) == 16
    norm = next(f for f in Finder().find(block) if "post_attention" in f.producer.tensor)
    assert len(norm.readers) == 1 + 2 * 16


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "falcon-new"])
def test_rows_of_q_and_k_keep_their_size_where_v_is_scaled(tmp_path, family):
    block = first_block(FAMILIES[family], tmp_path)
    fold = next(f for f in Finder().find(block) if f.producer.rows is not None and "down" not in f.readers[0].tensor)
    weight = next(w for w in block.weights if w.tensor == fold.producer.tensor)
    FoldSite(block, fold, dict.fromkeys(block.weights, GRID), {}).apply(torch.full((weight.shape[0],), 3.0))
    rest = [row for row in range(weight.shape[0]) if row not in fold.producer.rows]
    assert torch.equal(block.target(weight)[rest], block.weight(weight)[rest])
    torch.testing.assert_close(
        block.target(weight)[list(fold.producer.rows)] * 3, block.weight(weight)[list(fold.producer.rows)].float()
    )


def test_a_kept_router_takes_powers_of_two_in_memory(tmp_path):
    block = first_block(FAMILIES["mixtral"], tmp_path)
    fold = next(f for f in Finder().find(block) if "post_attention" in f.producer.tensor)
    router = next(m for m in fold.readers if m.weight is None)
    before = block.matrix(router).clone()
    FoldSite(block, fold, dict.fromkeys(block.weights, GRID), {}).apply(torch.full((64,), 2.0))
    assert torch.equal(block.matrix(router), before * 2)
    assert set(block.scales.columns) == {m.weight for m in fold.readers} - {None}


@pytest.mark.parametrize(
    ("out", "width", "head"),
    [(64, 64, 16), (32, 64, 16), (192, 64, 16), (128, 64, 16), (96, 64, 16), (128, 32, 8), (160, 64, 16), (20, 64, 16)],
)
def test_a_map_has_a_row_for_every_channel(out, width, head):
    for rows in row_maps(out, width, head):
        assert len(rows) == width
        assert set(rows) <= set(range(out))
        assert width % len(set(rows)) == 0
