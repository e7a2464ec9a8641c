"""The rules were read in the engines' own loaders: see the comments in engines/engines.py. What is pinned here is what
users rely on."""

import pytest
import torch

from halfbyte.engines.engines import ENGINES, engine_named
from halfbyte.engines.verdicts import check, default_container, verdicts
from halfbyte.errors import UnknownName
from halfbyte.formats import SCHEMES
from halfbyte.grids.schemes import parse
from halfbyte.models.weight import Weight
from halfbyte.targets.table import TARGETS

SHAPES = {  # Llama-3 8B
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
MOE = {
    f"mlp.experts.{e}.{n}": s
    for e in range(2)
    for n, s in {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}.items()
}


def place(grid, shapes=SHAPES, head=None, **others):
    """One block on a grid or scheme, but for matrices whose last name is in `others`; lm_head on `head`."""
    placed, block = {Weight("lm_head", "lm_head.weight", None, (128256, 4096)): head}, "model.layers.0"
    for name, shape in shapes.items():
        placed[Weight(f"{block}.{name}", f"{block}.{name}.weight", block, shape)] = others.get(
            name.rpartition(".")[2], grid
        )
    return {weight: parse(g) if g else None for weight, g in placed.items()}


def model(architecture="LlamaForCausalLM", model_type="llama", **settings):
    return {"architectures": [architecture], "model_type": model_type, **settings}


LLAMA, GPT2, GPT_OSS = model(), model("GPT2LMHeadModel", "gpt2"), model("GptOssForCausalLM", "gpt_oss")
QWEN3_MOE = model("Qwen3MoeForCausalLM", "qwen3_moe")


def judge(engine, container, placed, config=LLAMA):
    native = TARGETS[
        container
    ].resolve  # what a run asks of: the container's own scales, and inputs where it always rounds them
    verdict = check(engine, container, {w: native(s, torch.bfloat16) if s else None for w, s in placed.items()}, config)
    assert verdict.loads == (not verdict.reasons) == (verdict.command is not None)
    assert verdict.loads or verdict.tensor_parallel == ()
    return verdict


@pytest.mark.parametrize(
    ("engine", "container", "grid", "loads"),
    [
        ("vllm", "compressed-tensors", "int4-g128", True),
        ("vllm", "compressed-tensors", "int4-g128-asym", True),
        ("vllm", "compressed-tensors", "int8-channel", True),
        ("vllm", "compressed-tensors", "int8-channel-asym", False),
        ("vllm", "compressed-tensors", "int3-g128", True),
        ("vllm", "compressed-tensors", "int3-g128-asym", False),
        ("vllm", "compressed-tensors", "int4-tensor", False),
        ("vllm", "compressed-tensors", "int4-g256", False),
        ("vllm", "gptq", "int4-g128", True),
        ("vllm", "gptq", "int4-g128-asym", False),
        ("vllm", "gptq", "int3-g128", False),
        ("vllm", "awq", "int4-g128-asym", True),
        ("sglang", "compressed-tensors", "int4-g128", True),
        ("sglang", "compressed-tensors", "int3-g128", False),
        ("sglang", "gptq", "int3-g128-asym", True),
        ("transformers", "compressed-tensors", "int5-g16-asym", True),
        ("transformers", "compressed-tensors", "int4-tensor", True),
        ("transformers", "gptq", "int2-g128-asym", True),
        ("tgi", "compressed-tensors", "int4-g128", True),
        ("tgi", "compressed-tensors", "int4-g128-asym", False),
        ("tgi", "gptq", "int2-g128", True),
        ("tgi", "gptq", "int3-g128", False),
        ("tgi", "awq", "int4-channel-asym", False),
        ("tensorrt-llm", "gptq", "int4-g128", False),
        ("tensorrt-llm", "compressed-tensors", "int4-g128", False),
        ("vllm", "compressed-tensors", "fp8-e4m3-channel-bf16", True),
        ("vllm", "compressed-tensors", "nvfp4", True),
        ("vllm", "compressed-tensors", "mxfp6-e2m3", False),
        ("vllm", "fp8", "fp8-e4m3-block", True),
        ("vllm", "fp8", "fp8-e5m2-block", False),
        ("sglang", "compressed-tensors", "fp8-e4m3-block-bf16", False),
        ("sglang", "fp8", "fp8-e4m3-tensor", True),
        ("transformers", "compressed-tensors", "mxfp6-e2m3", True),
        ("transformers", "fp8", "fp8-e4m3-tensor", False),
        ("tensorrt-llm", "fp8", "fp8-e4m3-block", True),
        ("tgi", "fp8", "fp8-e4m3-block", False),
        ("vllm", "bitsandbytes", "int8-channel", True),
    ],
)
def test_grids(engine, container, grid, loads):
    assert judge(engine, container, place(grid)).loads == loads


@pytest.mark.parametrize(
    ("scheme", "engines"),
    [
        ("int8-channel/int8-token", "vllm sglang transformers tgi"),
        ("int8-tensor/int8-token", "vllm transformers tgi"),
        ("int8-channel/int8-token-asym", "vllm transformers tgi"),
        ("int8-channel/int8-static", "vllm transformers"),
        ("int8-channel/int8-static-asym", "vllm transformers"),
        ("int8-channel/int8-tensor", "transformers"),
        ("int8-channel-asym/int8-token", "transformers"),
        ("int8-g128/int8-token", "transformers"),
        ("fp8-e4m3-channel/fp8-e4m3-token", "vllm sglang transformers tgi tensorrt-llm"),
        ("fp8-e4m3-tensor/fp8-e4m3-static", "vllm sglang transformers tgi"),
        ("fp8-e4m3-channel/fp8-e4m3-static", "vllm transformers"),
        ("fp8-e4m3-tensor/fp8-e4m3-tensor", "vllm transformers"),
        ("fp8-e4m3-block/fp8-e4m3-g128", "vllm transformers tensorrt-llm"),
        ("fp8-e4m3-channel/fp8-e4m3-g128", "transformers"),
        ("mxfp8-e4m3/mxfp8-e4m3", "vllm transformers"),
        ("mxfp8-e4m3", "vllm transformers"),
        ("mxfp4/mxfp4", "vllm transformers"),
        ("mxfp4", "vllm transformers"),
        ("nvfp4/nvfp4", "vllm sglang transformers"),
        ("nvfp4/fp8-e4m3-token", ""),
        ("int4-g128/int8-token", "vllm transformers"),
        ("int4-g128/fp8-e4m3-token", "vllm transformers"),
        ("int4-g64/fp8-e4m3-token", "transformers"),
        ("int4-channel/int4-token", "transformers"),
    ],
)
def test_schemes_of_compressed_tensors(scheme, engines):
    assert [e for e in ENGINES if judge(e, "compressed-tensors", place(scheme)).loads] == engines.split()


def test_every_preset_is_loaded_by_some_engine():
    for preset in SCHEMES.values():
        assert any(judge(engine, "compressed-tensors", place(preset.scheme)).loads for engine in ENGINES), preset


def test_notes_tell_what_the_device_must_have():
    said = {
        scheme: " ".join(judge("vllm", "compressed-tensors", place(scheme)).notes)
        for scheme in ("mxfp4", "int4-g128/int8-token", "w4a8-fp8", "fp8")
    }
    assert "rounds inputs to MXFP4 on Blackwell" in said["mxfp4"]
    assert "Arm" in said["int4-g128/int8-token"]
    assert "9.0 exactly" in said["w4a8-fp8"]
    assert "8.9" in said["fp8"]


def test_hopper_kernel_of_w4a8_pads_nothing():
    shapes = {"mlp.down_proj": (4096 + 64, 4096)}
    assert judge("vllm", "compressed-tensors", place("int4-g128", shapes)).loads
    refused = judge("vllm", "compressed-tensors", place("int4-g128/fp8-e4m3-token", shapes))
    assert "no multiple of 128 x 128" in refused.reasons[0]


def test_every_flag_of_a_kernel_has_a_place_in_its_command():
    for engine in ENGINES.values():
        for support in engine.support.values():
            assert "{flags}" in (support.command or engine.command) or not any(
                kernel.flag for kernel in support.kernels
            )


def test_serving_says_how():
    verdict = judge("vllm", "compressed-tensors", place("int4-g128"))
    assert verdict.command.format(path="out") == "vllm serve out"
    assert verdict.tensor_parallel == (1, 2, 4, 8)
    slow = judge("sglang", "gptq", place("int4-g128-asym"))
    assert slow.command.endswith("--dtype float16")
    assert any("exllama" in note for note in slow.notes)
    assert judge("transformers", "gptq", place("int4-g128")).tensor_parallel == ()


@pytest.mark.parametrize(
    ("width", "group", "degrees"),
    [(11008, 128, (1, 2)), (14336, 32, (1, 2, 4, 8)), (1536, 128, (1, 2, 4)), (1536, 32, (1, 2, 4))],
)
def test_tensor_parallel_keeps_groups_and_tiles_whole(width, group, degrees):
    shapes = {"mlp.gate_proj": (width, 4096), "mlp.up_proj": (width, 4096), "mlp.down_proj": (4096, width)}
    assert judge("sglang", "compressed-tensors", place(f"int4-g{group}", shapes)).tensor_parallel == degrees


def test_small_shapes_are_padded_by_vllm_alone():
    shapes = {"mlp.down_proj": (96, 160)}
    verdict = judge("vllm", "compressed-tensors", place("int4-g32", shapes))
    assert verdict.tensor_parallel == (1,)
    assert any("45295" in note for note in verdict.notes)
    assert not judge("sglang", "compressed-tensors", place("int4-g32", shapes)).loads


@pytest.mark.parametrize(
    ("engine", "container", "placed", "word"),
    [
        ("vllm", "compressed-tensors", place("int4-g128", v_proj="int8-g128"), "fuses"),
        ("vllm", "compressed-tensors", place("int4-g128", up_proj=None), "fuses"),
        ("sglang", "gptq", place("int4-g128", k_proj="int8-g128"), "fuses"),
        ("vllm", "awq", place("int4-g128", down_proj="int4-g64"), "one grid"),
        ("transformers", "gptq", place("int4-g128", down_proj="int8-g128"), "one grid"),
        ("transformers", "gptq", place("int4-g128", down_proj=None), "kept"),
        ("tgi", "awq", place("int4-g128", o_proj=None), "kept"),
        ("sglang", "awq", place("int4-g128", gate_proj=None, up_proj=None), "kept"),
        ("sglang", "gptq", place("int4-g128", down_proj="int3-g128"), "one kernel"),
        ("vllm", "compressed-tensors", place("int4-g128", head="int8-channel"), "lm_head"),
        ("tgi", "gptq", place("int4-g128", head="int4-g128"), "lm_head"),
        ("vllm", "compressed-tensors", place("int4-g128-asym", MOE), "experts"),
        ("vllm", "compressed-tensors", place("int4-g128", MOE, down_proj="int8-g128"), "as one tensor"),
        ("vllm", "compressed-tensors", place("int8-channel/int8-static", MOE), "int8-channel/int8-token"),
        ("sglang", "compressed-tensors", place("int8-channel/int8-token", MOE), "experts"),
        (
            "sglang",
            "compressed-tensors",
            place("int8-channel/int8-token", down_proj="fp8-e4m3-channel/fp8-e4m3-token"),
            "one kernel",
        ),
        ("vllm", "compressed-tensors", place("int8-channel/int8-token", v_proj="int8-channel"), "fuses"),
        ("vllm", "gptq", place(None, MOE) | place("int4-g128"), "experts"),
        ("transformers", "compressed-tensors", place("int4-g128-asym", MOE), "experts"),
        ("transformers", "compressed-tensors", place("int8-channel/int8-token", MOE), "experts"),
        ("transformers", "compressed-tensors", place("int4-g128") | place(None, MOE), "quantize the experts too"),
        ("transformers", "compressed-tensors", place("int4-g128-asym", v_proj="int8-g128"), "use one grid"),
        ("mlx", "awq", place("int4-channel"), "no kernel"),
        ("mlx", "gptq", place("int4-g128"), "mlx_lm.convert"),
    ],
)
def test_refused(engine, container, placed, word):
    assert word in " ".join(judge(engine, container, placed).reasons)


@pytest.mark.parametrize(
    ("engine", "container", "placed"),
    [
        ("vllm", "compressed-tensors", place("int4-g128", down_proj="int8-g128", o_proj=None)),
        ("vllm", "gptq", place("int4-g128", down_proj="int8-g128", o_proj=None)),
        ("vllm", "gptq", place("int4-g128", head="int4-g128")),
        ("transformers", "compressed-tensors", place("int4-g128", v_proj="int8-g128", head="int8-channel")),
        ("sglang", "awq", place("int4-g128-asym", down_proj=None)),
        ("vllm", "compressed-tensors", place("int4-g128", MOE)),
        ("transformers", "compressed-tensors", place("int4-g128", MOE)),
        ("transformers", "compressed-tensors", place("int3-g64", SHAPES | MOE, gate_proj="int3-g64")),
        ("transformers", "compressed-tensors", place("int8-g128", SHAPES) | place("int4-g128", MOE)),
        ("mlx", "awq", place("int4-g64-asym")),
        ("vllm", "compressed-tensors", place("int8-channel/int8-token", MOE)),
        ("vllm", "compressed-tensors", place("nvfp4/nvfp4", down_proj="fp8-e4m3-channel/fp8-e4m3-token")),
        ("vllm", "compressed-tensors", place(None)),
    ],
)
def test_accepted(engine, container, placed):
    assert judge(engine, container, placed).loads


def test_conv1d():
    placed = {Weight("h.0.mlp.c_fc", "h.0.mlp.c_fc.weight", "h.0", (3072, 768), transposed=True): parse("int4-g128")}
    refused = judge("transformers", "compressed-tensors", placed, GPT2)
    assert "of gpt2 is a Conv1D" in refused.reasons[0]
    assert judge("transformers", "gptq", placed, GPT2).loads
    assert judge("vllm", "compressed-tensors", placed, GPT2).loads
    assert not judge("vllm", "compressed-tensors", dict.fromkeys(placed, parse("int8-channel/int8-token")), GPT2).loads


def test_experts_of_a_3d_tensor():
    block = "model.layers.0"
    experts = [
        Weight(f"{block}.mlp.experts.{e}.down_proj", f"{block}.mlp.experts.down_proj", block, (2880, 2880), False, e)
        for e in range(2)
    ]
    for engine in ENGINES:
        assert not judge(engine, "compressed-tensors", dict.fromkeys(experts, parse("int4-g32")), GPT_OSS).loads
    kept = judge("vllm", "compressed-tensors", place("int4-g128") | dict.fromkeys(experts), GPT_OSS)
    assert kept.loads
    assert any("not verified" in note for note in kept.notes)


def test_experts_that_are_no_linears_stay_and_are_not_promised_to_vllm():
    dbrx = model("DbrxForCausalLM", "dbrx")
    attention = {"attn.Wqkv": (8192, 6144), "attn.out_proj": (6144, 6144)}
    assert [e for e in ENGINES if judge(e, "compressed-tensors", place("int4-g128", attention), dbrx).loads] == [
        "sglang",
        "transformers",
    ]
    assert (
        "use transformers or sglang"
        in judge("vllm", "compressed-tensors", place("int4-g128", attention), dbrx).reasons[0]
    )


def test_every_engine_answers():
    assert [v.engine for v in verdicts("gptq", place("int4-g128"), LLAMA)] == list(ENGINES)
    assert all(default_container(engine) in TARGETS for engine in ENGINES)
    assert all(set(engine.support) <= set(TARGETS) for engine in ENGINES.values())


SPELLINGS = {
    "lm-studio": ["LM Studio", "lm-studio", "LMStudio", "lm_studio", "lms"],
    "llama.cpp": ["llama.cpp", "Llama.cpp", "llama-cpp", "llamacpp", "llama_cpp", "llama-server"],
    "tensorrt-llm": ["TensorRT-LLM", "trtllm", "TensorRT LLM"],
    "transformers": ["Transformers", "HF", "Hugging Face", "hf-transformers"],
    "tgi": ["TGI", "text-generation-inference"],
    "vllm": ["vLLM", "VLLM", "v-llm"],
    "sglang": ["SGLang", "sg-lang"],
    "mlx": ["MLX", "mlx-lm", "mlx_lm"],
    "ollama": ["Ollama", "OLLAMA"],
    "jan": ["Jan", "JAN"],
}


def test_an_engine_is_found_under_every_spelling():
    assert set(SPELLINGS) == set(ENGINES)
    assert {spelling: engine_named(spelling) for spellings in SPELLINGS.values() for spelling in spellings} == {
        spelling: engine for engine, spellings in SPELLINGS.items() for spelling in spellings
    }


@pytest.mark.parametrize(
    ("name", "meant"),
    [("olama", "ollama"), ("lmstudo", "lm-studio"), ("jam", "jan"), ("llamacp", "llama.cpp"), ("", "vllm")],
)
def test_what_is_none_is_told_which_may_be_meant(name, meant):
    with pytest.raises(UnknownName, match=meant):
        engine_named(name)


def test_unknown_engine_suggests():
    with pytest.raises(UnknownName, match="did you mean vllm"):
        check("vlm", "gptq", {}, LLAMA)


def test_blocks_of_fp8_are_split_whole():
    """vLLM's validate_fp8_block_shape: the parts of a fused matrix, and of one that is split, are whole blocks."""
    narrow = {**SHAPES, "self_attn.k_proj": (192, 4096), "self_attn.v_proj": (192, 4096)}
    verdict = judge("vllm", "fp8", place("fp8-e4m3-block", narrow))
    assert not verdict.loads
    assert "blocks of 128 x 128" in verdict.reasons[0]
    assert judge("vllm", "fp8", place("fp8-e4m3-block")).tensor_parallel == (1, 2, 4, 8)
