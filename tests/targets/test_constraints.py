"""Which weights are tied to each other is known before any is chosen for."""

import pytest

import halfbyte
from halfbyte.engines.engines import ENGINES
from halfbyte.errors import Unsupported
from halfbyte.grids import parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.weight import Weight
from halfbyte.names import FUSED, Expert, fused_set
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.targets.constraints import Rule, TiedGroup, fused, may_stay, stacks
from halfbyte.targets.table import TARGETS
from models.families import FAMILIES

BLOCK = "model.layers.0"
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
LLAMA = [Weight(f"{BLOCK}.{name}", f"{BLOCK}.{name}.weight", BLOCK, (64, 64)) for name in NAMES]
INT4, INT8 = parse("int4-g64"), parse("int8-g64")


def names(group: TiedGroup) -> list[str]:
    return [weight.name.rpartition(".")[2] for weight in group.weights]


def test_what_vllm_fuses_is_one_group_each():
    groups = fused(LLAMA, "vllm", "compressed-tensors")
    assert list(map(names, groups)) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    qkv = groups[0]
    assert qkv.is_kept(dict.fromkeys(LLAMA, INT4))
    assert qkv.is_kept({}), "all of them in 16 bits"
    assert not qkv.is_kept(dict.fromkeys(LLAMA, INT4) | {LLAMA[0]: INT8})
    assert not qkv.is_kept(dict.fromkeys(LLAMA[1:], INT4))
    assert fused(LLAMA, "llama.cpp", "gguf") == []


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi"])
@pytest.mark.parametrize("odd", LLAMA, ids=lambda w: w.name)
def test_a_choice_that_breaks_a_group_is_what_the_engine_refuses(engine, odd):
    from halfbyte.engines.verdicts import check

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    chosen = dict.fromkeys(LLAMA, parse("int4-g64-bf16")) | {odd: parse("int8-g64-bf16")}
    broken = [group for group in fused(LLAMA, engine, "gptq") if not group.is_kept(chosen)]
    said = " ".join(check(engine, "gptq", chosen, config).reasons)
    assert bool(broken) == ("fuses these into one matrix" in said)


def test_experts_of_a_stack_are_quantized_together_or_not_at_all():
    stack = [Weight(f"{BLOCK}.experts.{e}.up", f"{BLOCK}.experts.up", BLOCK, (64, 64), expert=e) for e in range(3)]
    (group,) = stacks([*LLAMA, *stack])
    assert group.rule is Rule.ALL_OR_NONE
    assert group.is_kept(dict(zip(stack, (INT4, INT4, INT8), strict=True)))
    assert not group.is_kept({stack[0]: INT4})


def test_containers_of_one_scheme_tie_all_weights(tmp_path):
    checkpoint = Checkpoint.open(FAMILIES["llama"].save(tmp_path / "model"))
    weights = list(checkpoint.weights())
    tied = {name: target.ties(checkpoint, weights) for name, target in TARGETS.items()}
    assert {name for name, groups in tied.items() if groups} == {"awq", "bitsandbytes", "fp8"}
    (group,) = tied["awq"]
    assert group.is_kept({weights[0]: INT4})
    assert not group.is_kept({weights[0]: INT4, weights[1]: INT8})


def test_experts_that_become_one_tensor_need_one_type_before_anything_is_written(tmp_path):
    source = FAMILIES["mixtral"].save(tmp_path / "model")
    one = next(w.name for w in Checkpoint.open(source).weights() if Expert.of(w.name))
    with pytest.raises(Unsupported, match=r"holds all experts of a block, so they need one type, not Q4_0, Q8_0"):
        resolve(Recipe(model=str(source), method="nearest", grid="Q8_0", to="gguf", override={one: "q4_0"}))
    with pytest.raises(Unsupported, match="so they need one type, not 16 bits, Q8_0"):
        resolve(Recipe(model=str(source), method="nearest", grid="Q8_0", to="gguf", skip=(one,)))


def test_a_plan_does_not_change(tmp_path):
    source = FAMILIES["llama"].save(tmp_path / "model")
    plan = resolve(Recipe(model=str(source), method="nearest", grid="int8-channel"))
    with pytest.raises(AttributeError):
        plan.recipe = plan.recipe  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        plan.schemes[next(iter(plan.schemes))] = INT4  # pyright: ignore[reportIndexIssue]
    for mapping in (plan.unquantized, plan.dropped, plan.scales):
        with pytest.raises(TypeError):
            mapping["more"] = None
    assert isinstance(plan.weights, tuple)
    assert isinstance(plan.verdicts, tuple)


def test_what_may_stay_in_16_bits():
    q, o = LLAMA[0], LLAMA[3]
    assert may_stay(q, "vllm", "compressed-tensors")
    unfused = [
        (e, c) for e, engine in ENGINES.items() for c, support in engine.support.items() if support.keeps == "unfused"
    ]
    assert unfused
    assert all(may_stay(o, *place) and not may_stay(q, *place) for place in unfused)


def test_names_are_parsed_once():
    assert Expert.of("model.layers.3.mlp.experts.17.up_proj") == ("model.layers.3.mlp.experts", 17, "up_proj")
    assert Expert.of("experts.0.down_proj.weight") == ("experts", 0, "down_proj.weight")
    assert Expert.of("model.layers.3.mlp.shared_experts.up_proj") is None
    assert Expert.of("model.layers.3.mlp.experts.gate_up_proj") is None
    assert fused_set("a.b.v_proj") == ("a.b", FUSED[0])
    assert fused_set("a.b.o_proj") is None


def test_a_mixed_stack_is_named_in_the_refusal(tmp_path):
    source = FAMILIES["mixtral"].save(
        tmp_path / "model",
    )
    with pytest.raises(halfbyte.HalfbyteError, match="awq holds one scheme for all weights, not "):
        halfbyte.quantize(
            source, tmp_path / "out", method="nearest", grid="int4-g64", to="awq", engine="none",
            override={"layers.0.self_attn.q_proj": "int4-g32"},
        )  # fmt: skip
