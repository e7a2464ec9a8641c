"""What each engine loads, as data: one row per engine and container.

The rules were read in the engines' own sources (vLLM 0.33, SGLang 0.5.23, TGI 3.3, TensorRT-LLM, mlx-lm 0.32,
Transformers 5.23 and earlier snapshots of them); each row names its file, and which test or benchmark of this
repository runs part of it. A rule that could not be verified refuses, and so does one that says an engine would round
inputs otherwise than the scheme has it, but for finer scales.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.errors import BadRequest, UnknownName, nearest

Code = tuple[int, bool]  # bits, and whether symmetric


@dataclass(frozen=True)
class KernelSupport:
    """One family of kernels of an engine, and the schemes and shapes that it multiplies by."""

    codes: frozenset[Code]  # integers under inputs in 16 bits
    granularities: frozenset[int | str]
    tiles: tuple[
        tuple[int, int], ...
    ] = ()  # (in, out): a partition must be a multiple of one of these, if there are any
    note: str = ""
    flag: str = ""  # what the command needs for this kernel
    scheme_pattern: str = ""  # all other schemes: a pattern of their names, without the precision of scales
    offer: str = ""  # ... in words
    strict_tiles: bool = False  # shapes that miss the tiles are refused even by an engine that pads others


def _named(
    pattern: str,
    offer: str,
    note: str = "",
    tiles: tuple[tuple[int, int], ...] = (),
    strict_tiles: bool = False,
    flag: str = "",
) -> KernelSupport:
    """A kernel for schemes by their names."""
    return KernelSupport(
        NONE, frozenset(), tiles, note, flag, scheme_pattern=pattern, offer=offer, strict_tiles=strict_tiles
    )


class Tested(NamedTuple):
    """What a test or a benchmark of this repository runs in an engine."""

    by: str
    schemes: str  # a pattern of their names
    models: str = r"Llama\w*"  # a pattern of architectures


@dataclass(frozen=True)
class EngineSupport:
    """How an engine reads one container."""

    kernels: tuple[KernelSupport, ...]  # fastest first; a grid runs on the first that takes it
    experts: frozenset[Code] = frozenset()  # what numbered experts (experts.7.up_proj) may be
    named_experts: tuple[str, ...] = ()  # ... and other schemes: patterns of their names
    whole: bool = False  # no matrix is split: no tensor parallelism
    spanned: str = ""  # what is to be known of blocks that span rows
    pads: bool = False  # shapes that miss the tiles are padded, not refused
    fuses: bool = True  # q, k, v and gate, up become one matrix each, so each set has one grid
    mixes: bool = True  # several grids in one checkpoint
    one_kernel: bool = False  # ... but only such as run on the same kernel
    together: str = ""  # ... or are of these: a pattern of schemes' names
    together_since: str = ""  # the first version that loads these
    shared_experts: bool = False  # shared experts become experts like others, so all have one grid
    base_experts: bool = False  # rules per module do not reach experts: all of them get the commonest grid
    keeps: str = (
        "any"  # which matrices of a block may stay in 16 bits: "any", "unfused" (not q, k, v, gate, up) or "none"
    )
    heads: str = ""  # what a quantized lm_head may be: a pattern of schemes' names
    heads_since: str = ""  # the first version that loads one
    transposed: bool = False  # GPT-2's Conv1D
    everything: bool = False  # whatever the container holds, wherever it is
    numbered_kept: bool = True  # numbered experts may stay in 16 bits
    decodes: bool = False  # packed zero points, and models whose code reads weights, load if all is decoded on the way
    parallel: bool = True  # whether it is known over how many GPUs matrices split
    notes: tuple[str, ...] = ()
    command: str = ""  # instead of the engine's
    models: str = ""  # those it knows, in architectures.yaml; empty: all that the container is written of
    source: str = ""  # where the rules were read
    tested: tuple[Tested, ...] = ()


@dataclass(frozen=True)
class ServerOptions:
    """What an engine's server calls its options; the command that `Engine.command` begins starts one."""

    name: str
    context: str
    slots: str
    key: str  # an environment variable, so that nobody reads the key in a list of processes; or an option
    shared_context: bool = False  # the context is that of all slots together
    script: tuple[str, ...] = ()  # what takes the place of `python -m MODULE` where only this is on the PATH
    source: str = ""  # where they were read; none was run here


@dataclass(frozen=True)
class Engine:
    """An engine, and how it reads each container."""

    title: str
    command: str
    default: str
    support: Mapping[str, EngineSupport]
    otherwise: str  # what would work, said of a container that is not in `support`
    parallel: bool = True
    names: tuple[str, ...] = ()  # what else people call it
    server: ServerOptions | None = None  # of those that `serve` starts


DEGREES = (1, 2, 4, 8)
NONE: frozenset[Code] = frozenset()
SYMMETRIC = frozenset({(4, True), (8, True)})
INT4 = frozenset({(4, True), (4, False)})
PACKED = frozenset((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False))
ANY = frozenset((bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))
ODD = frozenset((bits, True) for bits in (2, 3, 5, 6, 7))
# Marlin's groups: vllm-project/vllm model_executor/layers/quantization/utils/marlin_utils.py; SGLang and TGI have the
# same.
GROUPS: frozenset[int | str] = frozenset({32, 64, 128})
GRANULARITIES = GROUPS | {"channel"}
# Marlin's tiles: either (vllm marlin_utils.py marlin_padded_nk; TGI layers/marlin/gptq.py _check_valid_shape), or the
# first alone (sglang awq/schemes/awq_marlin.py verify_marlin_supports_shape).
TILES = ((128, 64), (64, 128))
SIXTEENS = ((16, 16),)
"""Tiles of products of 8 bits (vllm csrc/quantization/w8a8/cutlass; sgl-kernel csrc/gemm)."""
TURING = "4 and 8 bits run on Marlin or Machete kernels: an NVIDIA GPU of compute capability 7.5 or later"
AMPERE = "runs on Marlin kernels: an NVIDIA GPU of compute capability 8.0 or later"
HUMMING = (
    "2, 3, 5, 6 and 7 bits need vLLM of mid-2026 or later and its Humming kernels (NVIDIA only): read in its "
    "source, not run"
)
EXLLAMA = "runs on the slower exllama kernel, in float16 only"
BITSANDBYTES = "needs the package bitsandbytes, 0.46.1 or later"
SPANNED = "bitsandbytes 0.50 decodes it wrongly on CPUs (not on GPUs), as its blocks span rows; smaller ones would not"
BLOCKS_AND_BYTES = _named(r"(nf4|fp4)-[^/]*|llm-int8/llm-int8", "nf4 and fp4 in blocks, and int8-channel as LLM.int8()")
FP8_WEIGHTS = "FP8 weights alone run on Marlin kernels: an NVIDIA GPU of compute capability 8.0 or later"
FP8_ROWS = _named(r"fp8-e4m3-(channel|tensor)", "fp8-e4m3 per channel, tensor", FP8_WEIGHTS, TILES[:1])
INPUTS_IN_FP8 = (
    "the engine rounds inputs to FP8 on GPUs of compute capability 8.9 or later; older ones leave inputs in 16 bits"
)
FP8_HEAD = "fp8-e4m3-channel/fp8-e4m3-token"
FP8_ROUNDED = "fp8-e4m3-channel/fp8-e4m3-token, fp8-e4m3-tensor/fp8-e4m3-static"
FP8_BLOCKS = _named(r"fp8-e4m3-block/fp8-e4m3-g128", "fp8-e4m3-block/fp8-e4m3-g128", INPUTS_IN_FP8)
FP8_LOADED = _named(
    r"fp8-e4m3-(block/fp8-e4m3-g128|tensor/fp8-e4m3-(token|static))",
    "fp8-e4m3-block/fp8-e4m3-g128, fp8-e4m3-tensor/fp8-e4m3-token or -static",
    INPUTS_IN_FP8,
)
MX_INPUTS = (
    "vLLM rounds inputs to {0} on Blackwell whatever the config says; older GPUs (compute capability 8.0 or "
    "later) leave them in 16 bits"
)
NVFP4_INPUTS = (
    "4-bit products need an NVIDIA GPU of compute capability 10.0 or later; older ones (7.5 or later) leave "
    "inputs in 16 bits"
)
W4A8_FP8 = (
    "needs an NVIDIA GPU of compute capability 9.0 exactly (Hopper), where vLLM also rounds the scales of groups to FP8"
)
W4A8_INT = "int4 under int8 inputs runs on Arm CPUs and Intel GPUs only; on Hopper, int4-g128/fp8-e4m3-token does"
FP8_EXPERTS = ("fp8-e4m3-block/fp8-e4m3-g128", "fp8-e4m3-tensor/fp8-e4m3-token", "fp8-e4m3-tensor/fp8-e4m3-static")
INPUTS_IN_INT8 = "products of int8 run on GPUs of compute capability 7.5 or later"
MAINTAINED = ("TGI is in maintenance mode", "computes in float16")
# vllm_gguf_plugin/quantization/utils.py and SGLang's (quantization)/gguf.py list the same types.
GGUF_INTEGERS = frozenset({(4, True), (5, True), (8, True)})
GGUF_TYPES = _named(r"q4_1|q5_1|q[2-6]_k|iq[1-4]_\w+", "q4_1, q5_1, q2_k to q6_k, iq1_s to iq4_xs")
BY_LLAMA_CPP = (
    "runs it through llama.cpp, which the tests here load it in; an older copy of that may lack new types and models"
)
CPU_RUNS = "benchmarks/vllm_cpu.py"
GPTQMODEL_RUNS = "tests/containers/test_gptqmodel_oracle.py"

# Split along `in` in tensor parallelism: RowParallelLinear in vllm model_executor/models/*.py. All others are split
# along `out`.
ROW = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|c_proj|wo|w2|fc2|fc_out|dense_4h_to_h|attention\.dense|self_attn\.dense)$"
)

# Paths: vllm/ of vllm-project/vllm; python/sglang/srt/ of sgl-project/sglang; server/text_generation_server/ of
# huggingface/text-generation-inference. (quantization) is model_executor/layers/quantization in vLLM,
# layers/quantization in SGLang.
VLLM = {
    # (quantization)/compressed_tensors/schemes/compressed_tensors_wNa16.py: symmetric 2 to 8 bits, zero points at 4 and
    # 8; of those only Hopper's Machete and the package conch have 8 (model_executor/kernels/linear/mixed_precision/*.py
    # can_implement); requirements/cuda.txt: humming-kernels; models/gpt2.py transposes tensors named .weight only.
    # lm_head: get_quant_method in compressed_tensors.py asks for a target that names it, and "Linear" does not. In FP8
    # under inputs in FP8 it is served (unsloth/Qwen3.8-27B-NVFP4); FP8 weights alone fail there (pull request 52543).
    "compressed-tensors": EngineSupport(
        (
            KernelSupport(SYMMETRIC | INT4, GRANULARITIES, TILES, TURING),
            KernelSupport(ODD, GRANULARITIES, note=HUMMING),
            # schemes/compressed_tensors_{w8a16_fp8,w4a4_nvfp4}.py; _get_scheme_from_parts in compressed_tensors.py.
            FP8_ROWS,
            _named(r"fp8-e4m3-block", "fp8-e4m3-block", "fp8-e4m3-block with 16-bit inputs needs vLLM of 2026", TILES),
            _named(
                r"nvfp4",
                "nvfp4",
                "NVFP4 weights alone run on Marlin kernels: compute capability 7.5 or later",
                TILES,
            ),
            # schemes/compressed_tensors_{w4a4_mxfp4,w8a8_mxfp8}.py do not look at input_activations: kernels decide, in
            # the order of kernels/linear/__init__.py, where FlashInfer's (Blackwell) round inputs and Marlin's, which
            # come next, do not.
            _named(r"mxfp4(/mxfp4)?", "mxfp4", MX_INPUTS.format("MXFP4"), TILES),
            _named(r"mxfp8-e4m3(/mxfp8-e4m3)?", "mxfp8-e4m3", MX_INPUTS.format("MXFP8"), TILES),
            # schemes/compressed_tensors_w8a8_int8.py (symmetric weights; inputs per token or stored, with zero points
            # or not).
            _named(
                r"int8-(channel|tensor)/int8-(token|static)(-asym)?",
                "int8-channel/int8-token or -static, and -asym",
                INPUTS_IN_INT8,
                SIXTEENS,
            ),
            # schemes/compressed_tensors_w8a8_fp8.py: per tensor, a fused matrix is rounded again to the largest of its
            # scales.
            _named(r"fp8-e4m3-(channel|tensor)/fp8-e4m3-(token|static)", FP8_ROUNDED, INPUTS_IN_FP8),
            _named(
                r"fp8-e4m3-(channel|tensor)/fp8-e4m3-tensor",
                "",
                f"{INPUTS_IN_FP8}; vLLM finds a scale for each token, not one for all",
            ),
            FP8_BLOCKS,
            # schemes/compressed_tensors_w4a4_nvfp4.py: fused matrices share the largest divisor, and warn if theirs
            # differ.
            _named(r"nvfp4/nvfp4", "nvfp4/nvfp4", NVFP4_INPUTS, TILES),
            # schemes/compressed_tensors_w4a8_fp8.py and kernels/linear/mixed_precision/cutlass.py: compute capability
            # 9.0 exactly.
            _named(r"int4-g128/fp8-e4m3-token", "int4-g128/fp8-e4m3-token", W4A8_FP8, ((128, 128),), strict_tiles=True),
            # schemes/compressed_tensors_w4a8_int.py: of kernels/linear/mixed_precision, dynamic_4bit.py and xpu.py take
            # signed 4 bits in bytes.
            _named(r"int4-(channel|g32|g64|g128)/int8-token(-asym)?", "int4-g128/int8-token", W4A8_INT),
        ),
        experts=SYMMETRIC,
        # compressed_tensors_moe.py get_moe_method: FP8 has experts with quantized inputs only; int8 per channel and
        # token only.
        named_experts=(
            *(
                "nvfp4",
                "nvfp4/nvfp4",
                "mxfp4",
                "mxfp4/mxfp4",
                "mxfp8-e4m3",
                "mxfp8-e4m3/mxfp8-e4m3",
                "int8-channel/int8-token",
            ),
            *(
                "fp8-e4m3-channel/fp8-e4m3-token",
                "fp8-e4m3-tensor/fp8-e4m3-static",
                "fp8-e4m3-block/fp8-e4m3-g128",
                "int4-g128/fp8-e4m3-token",
            ),
        ),
        pads=True,
        transposed=True,
        heads=FP8_HEAD,
        heads_since="vLLM of March 2026 or later (pull request 37291)",
        models="vllm",
        source="vLLM 0.33.0, model_executor/layers/quantization/compressed_tensors",
        tested=(Tested(CPU_RUNS, r"int4-(g128|channel)(-asym)?|int8-(channel|tensor)/int8-token(-asym)?"),),
    ),
    # (quantization)/auto_gptq.py TYPE_MAP; utils/gptq_utils.py get_dynamic_override (experts have one name,
    # mlp.experts). Pull request 38288 (mid-2026) took away gptq.py, whose exllama kernel ran zero points, 2 and 3 bits.
    "gptq": EngineSupport(
        (KernelSupport(SYMMETRIC, GRANULARITIES, TILES),),
        experts=SYMMETRIC,
        pads=True,
        base_experts=True,
        heads=".*",
        transposed=True,
        notes=(TURING,),
        models="vllm",
        source="vLLM 0.33.0, model_executor/layers/quantization/auto_gptq.py",
        tested=(Tested(CPU_RUNS, "int4-g128"),),
    ),
    # (quantization)/auto_awq.py. lm_head: only if the config says "lm_head", which ours does not.
    "awq": EngineSupport(
        (KernelSupport(INT4, GRANULARITIES, TILES),),
        experts=INT4,
        pads=True,
        mixes=False,
        base_experts=True,
        transposed=True,
        notes=(TURING,),
        models="vllm",
        source="vLLM 0.33.0, model_executor/layers/quantization/auto_awq.py",
        tested=(Tested(CPU_RUNS, "int4-g128(-asym)?"),),
    ),
    # (quantization)/fp8.py Fp8Config, Fp8LinearMethod, Fp8MoEMethod; per tensor, a fused matrix is rounded again to the
    # largest scale.
    "fp8": EngineSupport(
        (FP8_LOADED,),
        named_experts=FP8_EXPERTS,
        mixes=False,
        models="vllm",
        source="vLLM 0.33.0, model_executor/layers/quantization/fp8.py",
    ),
    # vllm_bnb_plugin/bitsandbytes_loader.py: _verify_model_compatibility, _fuse_moe_quant_states (NF4 only);
    # bitsandbytes.py: is_layer_skipped_bnb looks for the kept names in fused names. Found without flags since pull
    # request 16027 (April 2025), out of the tree since 43529 (0.27.2).
    "bitsandbytes": EngineSupport(
        (BLOCKS_AND_BYTES,),
        named_experts=("nf4-.*",),
        mixes=False,
        keeps="unfused",
        whole=True,
        notes=(BITSANDBYTES, "vLLM 0.27.2 and later need the package vllm-bnb-plugin too"),
        models="vllm",
        source="vllm-bnb-plugin, bitsandbytes_loader.py (before 0.27.2 in vLLM itself)",
    ),
    # vllm_gguf_plugin/quantization/utils.py DEQUANT_TYPES; loader.py. config.json and the tokenizer are looked for
    # beside the file.
    "gguf": EngineSupport(
        (KernelSupport(GGUF_INTEGERS, frozenset({32})), GGUF_TYPES),
        named_experts=(".*",),
        experts=GGUF_INTEGERS,
        fuses=False,
        heads=".*",
        transposed=True,
        parallel=False,
        notes=(
            "needs the package vllm-gguf-plugin, and takes config.json and tokenizer from the original; its authors "
            "call it experimental",
        ),
        command="vllm serve {path} --hf-config-path {original} --tokenizer {original} --dtype float16",
        models="vllm-gguf",
        source="vllm-gguf-plugin 0.0.5, quantization/utils.py, and vLLM's docs/features/quantization/gguf.md",
    ),
}
SGLANG = {
    # (quantization)/compressed_tensors/schemes/compressed_tensors_wNa16.py; a quantized lm_head gave noise in silence
    # (issue 35358). schemes/compressed_tensors_w8a16_fp8.py has rows and tensors, no blocks.
    # schemes/compressed_tensors_w8a8_int8.py rounds inputs per token without zero points whatever the config says, so
    # stored scales and zero points would be ignored; its scales are of channels. _get_scheme_from_parts goes by the
    # format of the whole checkpoint, which several formats do not have; since pull request 32736 NVFP4 and FP8 go by
    # that of their group, and names in `ignore` are no longer looked for inside of others. Shared experts are fused
    # into the routed ones, and fail where their schemes differ (pull request 37207).
    "compressed-tensors": EngineSupport(
        (
            KernelSupport(SYMMETRIC | INT4, GRANULARITIES, TILES[:1], AMPERE),
            FP8_ROWS,
            _named(
                r"int8-channel/int8-token",
                "int8-channel/int8-token",
                "products of int8 run on GPUs of compute capability 8.0 or later",
                SIXTEENS,
            ),
            _named(
                r"fp8-e4m3-(channel/fp8-e4m3-token|tensor/fp8-e4m3-(token|static))",
                FP8_ROUNDED,
                INPUTS_IN_FP8,
                SIXTEENS,
            ),
            _named(
                r"nvfp4/nvfp4",
                "nvfp4/nvfp4",
                "4-bit products need an NVIDIA GPU of compute capability 10.0 or later",
            ),
        ),
        experts=SYMMETRIC,
        named_experts=("fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-tensor/fp8-e4m3-static", "nvfp4/nvfp4"),
        one_kernel=True,
        together=rf"{FP8_HEAD}|nvfp4/nvfp4",
        together_since="SGLang of August 2026 or later (pull request 32736); before, all of it loads in 16 bits",
        shared_experts=True,
        heads=FP8_HEAD,
        heads_since="SGLang of the end of August 2026 or later (pull request 35228)",
        models="sglang",
        source="SGLang, srt/layers/quantization/compressed_tensors",
    ),
    # (quantization)/gptq/gptq.py: GPTQMarlinConfig, or else GPTQConfig (float16, no experts);
    # gptq/schemes/gptq_linear.py.
    "gptq": EngineSupport(
        (
            KernelSupport(SYMMETRIC, GRANULARITIES, TILES[:1], AMPERE),
            KernelSupport(PACKED, GRANULARITIES, note=EXLLAMA, flag=" --dtype float16"),
        ),
        experts=SYMMETRIC,
        one_kernel=True,
        base_experts=True,
        heads=".*",
        models="sglang",
        source="SGLang, srt/layers/quantization/gptq",
    ),
    # (quantization)/fp8.py Fp8Config, Fp8LinearMethod.
    "fp8": EngineSupport(
        (FP8_LOADED,),
        named_experts=FP8_EXPERTS,
        mixes=False,
        models="sglang",
        source="SGLang, srt/layers/quantization/fp8.py",
    ),
    # (quantization)/awq/awq.py: is_layer_skipped_awq looks for the kept names in fused names.
    "awq": EngineSupport(
        (KernelSupport(INT4, GRANULARITIES, TILES[:1], AMPERE),),
        experts=INT4,
        mixes=False,
        base_experts=True,
        keeps="unfused",
        models="sglang",
        source="SGLang, srt/layers/quantization/awq",
    ),
    # (quantization)/gguf.py; model_loader/loader.py GGUFModelLoader; found by the file's first bytes
    # (arg_groups/overrides.py).
    "gguf": EngineSupport(
        (KernelSupport(GGUF_INTEGERS, frozenset({32})), GGUF_TYPES),
        fuses=False,
        heads=".*",
        parallel=False,
        notes=("needs an NVIDIA GPU",),
        models="sglang-gguf",
        source="SGLang 0.5.23, srt/layers/quantization/gguf.py and model_loader/loader.py",
    ),
}
LOADED = (
    r"\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel)|(Llama|Qwen3)Model|(Llama|Qwen2)ForSequenceClassification"
)
"""The models that tests/engines/test_transformers.py loads: all of the list in architectures.yaml, and of those that
derive from it, these."""
ROUNDS_INPUTS = "inputs are rounded, and multiplied in 16 bits"
# compressed_tensors/compressors/nvfp4/helpers.py, mx_utils.py: a model of another dtype loads, and its first product
# fails.
IN_BFLOAT16 = "compressed-tensors 0.20 decodes MX and NVFP4 in bfloat16, so the model is loaded in that"
AS_BFLOAT16 = ', dtype="bfloat16"'
TRANSFORMERS = {
    # transformers/quantizers/quantizer_compressed_tensors.py; compressed_tensors/quantization/lifecycle/apply.py:
    # nn.Linear only. Experts become 3-D parameters, decoded on the way (integrations/compressed_tensors.py
    # CompressedTensorsDequantize: no zero points, no blocks, none in 16 bits where others are quantized, and one scheme
    # for whatever is called experts).
    "compressed-tensors": EngineSupport(
        (
            KernelSupport(ANY, GRANULARITIES | {"any group", "tensor"}),
            _named(r"fp8-e4m3-[^/]*", "fp8-e4m3"),
            _named(
                r"mxfp8-e4m3|mxfp6-e2m3|mxfp4|nvfp4",
                "mxfp8-e4m3, mxfp6-e2m3, mxfp4, nvfp4",
                IN_BFLOAT16,
                flag=AS_BFLOAT16,
            ),
            # compressed_tensors/quantization/lifecycle/forward.py rounds inputs and multiplies in 16 bits.
            _named(
                r"(int[2-8]|fp8-e4m3)-[^/]*/(int[2-8]|fp8-e4m3)-(token|tensor|static|g\d+)(-asym)?",
                "integers and floats under inputs rounded in any way",
                ROUNDS_INPUTS,
            ),
            _named(
                r"mxfp8-e4m3/mxfp8-e4m3|mxfp4/mxfp4|nvfp4/nvfp4",
                "mxfp8-e4m3, mxfp4 and nvfp4 under inputs of their kind",
                f"{ROUNDS_INPUTS}; {IN_BFLOAT16}",
                flag=AS_BFLOAT16,
            ),
        ),
        experts=frozenset((bits, True) for bits in range(2, 9)),
        named_experts=("fp8-e4m3-(channel|tensor)",),
        numbered_kept=False,
        decodes=True,
        fuses=False,
        heads=".*",
        notes=(
            "needs the package compressed-tensors, which decompresses the weights: it saves no memory or "
            "time at run time",
        ),
        models="transformers",
        source="Transformers 5.23.0, quantizers/quantizer_compressed_tensors.py",
        tested=(Tested("tests/engines/test_transformers.py", ".*", LOADED),),
    ),
    # transformers/quantizers/quantizer_gptq.py, huggingface/optimum optimum/gptq/quantizer.py convert_model: all layers
    # of the blocks get one setting (`dynamic` is not read), lm_head none; Conv1D is replaced too.
    "gptq": EngineSupport(
        (KernelSupport(PACKED, GRANULARITIES),),
        fuses=False,
        mixes=False,
        keeps="none",
        transposed=True,
        notes=("needs gptqmodel and optimum",),
        models="transformers-linears",
        source="Transformers 5.23.0, quantizers/quantizer_gptq.py",
        tested=(Tested(GPTQMODEL_RUNS, r"int4-g128(-asym)?|int2-g32-asym|int3-g64(-asym)?|int8-(g64|channel)"),),
    ),
    # transformers/quantizers/quantizer_awq.py, integrations/awq.py: nn.Linear only, and not the head.
    "awq": EngineSupport(
        (KernelSupport(INT4, GRANULARITIES),),
        fuses=False,
        mixes=False,
        notes=("needs the packages gptqmodel and accelerate; float16 on GPUs",),
        models="transformers-linears",
        source="Transformers 5.23.0, quantizers/quantizer_awq.py",
        tested=(Tested(GPTQMODEL_RUNS, r"int4-g128|int4-(g64|channel)-asym"),),
    ),
    # transformers/quantizers/quantizer_finegrained_fp8.py, integrations/finegrained_fp8.py: nn.Linear, and experts that
    # it fuses itself. Without a GPU it decodes them.
    "fp8": EngineSupport(
        (FP8_BLOCKS,),
        named_experts=(FP8_BLOCKS.scheme_pattern,),
        fuses=False,
        mixes=False,
        models="transformers-linears",
        source="Transformers 5.23.0, quantizers/quantizer_finegrained_fp8.py",
        tested=(Tested("tests/containers/test_fp8.py", ".*"),),
    ),
    # transformers/quantizers/quantizer_bnb_{4,8}bit.py, integrations/bitsandbytes.py: nn.Linear and Conv1D, and the
    # head if it is not among the skipped modules.
    "bitsandbytes": EngineSupport(
        (BLOCKS_AND_BYTES,),
        fuses=False,
        mixes=False,
        heads=".*",
        transposed=True,
        spanned=SPANNED,
        notes=(BITSANDBYTES,),
        models="transformers-linears",
        source="Transformers 5.23.0, quantizers/quantizer_bnb_4bit.py and quantizer_bnb_8bit.py",
        tested=(Tested("tests/containers/test_bitsandbytes.py", ".*"),),
    ),
    # transformers/modeling_gguf_pytorch_utils.py, with the package gguf's decoders of every type.
    "gguf": EngineSupport(
        (),
        everything=True,
        notes=("needs the package gguf, which decodes the weights: it saves no memory or time at run time",),
        command='AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{file}", dtype="auto", device_map="auto")',
        models="transformers-gguf",
        source="Transformers 5.23.0, modeling_gguf_pytorch_utils.py",
        tested=(Tested("tests/engines/test_transformers.py", ".*", ".*"),),
    ),
}
TGI = {
    # layers/compressed_tensors/{loader,wna16_int}.py (zero points are looked for as .qzeros); the head:
    # layers/tensor_parallel.py. w8a8_int.py finds scales of tokens even where some are stored; w8an_fp.py takes rows
    # and tensors, and blocks of neither kind; loader.py goes by the format of the whole checkpoint.
    "compressed-tensors": EngineSupport(
        (
            KernelSupport(SYMMETRIC, GRANULARITIES, TILES, AMPERE),
            _named(
                r"int8-(channel|tensor)/int8-token(-asym)?",
                "int8-channel/int8-token, and -asym",
                INPUTS_IN_INT8,
                SIXTEENS,
            ),
            _named(
                r"fp8-e4m3-(channel/fp8-e4m3-token|tensor/fp8-e4m3-(token|static))",
                FP8_ROUNDED,
                INPUTS_IN_FP8,
                SIXTEENS,
            ),
        ),
        one_kernel=True,
        notes=MAINTAINED[:1],
        models="tgi",
        source="TGI 3.3, server/text_generation_server/layers/compressed_tensors",
    ),
    # utils/quantization.py (no `dynamic`), layers/marlin/gptq.py, layers/gptq/triton.py (2, 4, 8 bits).
    "gptq": EngineSupport(
        (
            KernelSupport(SYMMETRIC, GRANULARITIES, TILES, AMPERE),
            KernelSupport(
                PACKED - {(3, True), (3, False)}, GRANULARITIES, note="runs on slower exllama or Triton kernels"
            ),
        ),
        mixes=False,
        keeps="none",
        notes=MAINTAINED,
        models="tgi",
        source="TGI 3.3, server/text_generation_server/layers/gptq",
    ),
    # layers/marlin/gptq.py: GPTQMarlinWeightsLoader knows no kept modules, and divides by the group size, -1 for
    # channels.
    "awq": EngineSupport(
        (KernelSupport(INT4, GROUPS, TILES, AMPERE),),
        mixes=False,
        keeps="none",
        notes=MAINTAINED,
        models="tgi",
        source="TGI 3.3, server/text_generation_server/layers/marlin/gptq.py",
    ),
}
# mlx_lm/utils.py _transform_awq_weights: 4 bits per group alone; it refuses GPTQ's g_idx, and looks for
# compressed-tensors' parts under names that they do not have. mx.quantize knows these groups.
MLX = {
    "awq": EngineSupport(
        (KernelSupport(INT4, GROUPS),),
        fuses=False,
        mixes=False,
        parallel=False,
        notes=("Apple silicon; computes in float16",),
        models="mlx",
        source="mlx-lm 0.32.2, utils.py",
    ),
}
LLAMA_CPP = Tested("tests/targets/gguf/test_llamacpp_families.py", ".*", ".*")
ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM",
        "vllm serve {path}",
        "compressed-tensors",
        VLLM,
        "write compressed-tensors, gptq or awq",
        server=ServerOptions(
            name="--served-model-name",
            context="--max-model-len",
            slots="--max-num-seqs",
            key="VLLM_API_KEY",
            source="vLLM, vllm/entrypoints/openai/cli_args.py and docs/getting_started/quickstart.md",
        ),
    ),
    "sglang": Engine(
        "SGLang",
        "python -m sglang.launch_server --model-path {path}{flags}",
        "gptq",
        SGLANG,
        "write gptq, compressed-tensors or awq",
        server=ServerOptions(
            name="--served-model-name",
            context="--context-length",
            slots="--max-running-requests",
            key="--api-key",
            script=("sglang", "serve"),
            source="SGLang, docs/advanced_features/server_arguments.md, python/sglang/cli/serve.py",
        ),
    ),
    "transformers": Engine(
        "Transformers",
        '{auto}.from_pretrained("{path}", device_map="auto"{flags})',
        "compressed-tensors",
        TRANSFORMERS,
        "write compressed-tensors, gptq or awq",
        parallel=False,
        names=("hf", "huggingface", "hftransformers"),
    ),
    "tgi": Engine(
        "Text Generation Inference",
        "text-generation-launcher --model-id {path}",
        "gptq",
        TGI,
        "write gptq, compressed-tensors or awq",
        names=("textgenerationinference",),
    ),
    # NVIDIA/TensorRT-LLM tensorrt_llm/_torch/model_config.py load_hf_quant_config; the scripts that converted AutoGPTQ
    # and AutoAWQ files went with its TensorRT backend.
    "tensorrt-llm": Engine(
        "TensorRT-LLM",
        "trtllm-serve {path}",
        "compressed-tensors",
        {
            # models/quant_config_utils.py: FP8 per channel and token or in blocks, no integers. Its NVFP4 and MXFP4 are
            # for models that rename weight_packed themselves.
            "compressed-tensors": EngineSupport(
                (
                    _named(
                        r"fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-channel/fp8-e4m3-token", INPUTS_IN_FP8, SIXTEENS
                    ),
                    FP8_BLOCKS,
                ),
                models="tensorrt-llm",
                source="TensorRT-LLM, tensorrt_llm/_torch/model_config.py",
            ),
            # model_config.py load_hf_quant_config: DeepSeek's blocks, whatever the config says of modules that are
            # kept.
            "fp8": EngineSupport(
                (FP8_BLOCKS,),
                mixes=False,
                keeps="none",
                models="tensorrt-llm",
                source="TensorRT-LLM, tensorrt_llm/_torch/model_config.py",
            ),
        },
        "it loads FP8, NVFP4, MXFP4 and ModelOpt checkpoints; serve integer weights with vllm or sglang",
        names=("trtllm", "tensorrt"),
    ),
    # src/llama-model-loader.cpp: every type of ggml, whichever tensor has it.
    "llama.cpp": Engine(
        "llama.cpp",
        "llama-server -m {path}",
        "gguf",
        {
            "gguf": EngineSupport(
                (), everything=True, source="llama.cpp, src/llama-model-loader.cpp", tested=(LLAMA_CPP,)
            )
        },
        "write gguf",
        parallel=False,
        names=("llamacpp", "llamaserver", "ggml", "gguf"),
        server=ServerOptions(
            name="--alias",
            context="--ctx-size",
            slots="--parallel",
            key="LLAMA_API_KEY",
            shared_context=True,
            source="llama.cpp, tools/server/README.md",
        ),
    ),
    # The Modelfile is written beside the GGUF.
    "ollama": Engine(
        "Ollama",
        "ollama create {name} -f {modelfile}",
        "gguf",
        {"gguf": EngineSupport((), everything=True, notes=(BY_LLAMA_CPP,), source="ollama's docs/import.md")},
        "write gguf",
        parallel=False,
    ),
    "lm-studio": Engine(
        "LM Studio",
        "lms import {path}",
        "gguf",
        {
            "gguf": EngineSupport(
                (), everything=True, notes=(BY_LLAMA_CPP,), source="lmstudio.ai/docs/advanced/sideload"
            )
        },
        "write gguf",
        parallel=False,
        names=("lmstudio", "lms"),
    ),
    "jan": Engine(
        "Jan",
        "# in Jan: Settings > Llama.cpp > Import, then choose {path}",
        "gguf",
        {
            "gguf": EngineSupport(
                (),
                everything=True,
                notes=(BY_LLAMA_CPP,),
                source="janhq/jan, docs/src/pages/docs/desktop/manage-models.mdx",
            )
        },
        "write gguf",
        parallel=False,
    ),
    "mlx": Engine(
        "MLX",
        "mlx_lm.server --model {path}",
        "awq",
        MLX,
        "of what is written here it reads awq; its own format is made of the original in 16 bits, by mlx_lm.convert",
        parallel=False,
        names=("mlxlm", "applemlx"),
    ),
}
NOBODY = "none"
"""In place of an engine: write it although none loads it."""


def engine_named(name: str) -> str:
    """The key of an engine under any spelling. Raises UnknownName, with the one that may be meant."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    match = next((key for key, engine in ENGINES.items() if plain in (re.sub(r"[^a-z]", "", key), *engine.names)), None)
    if match:
        return match
    near = nearest(plain, [*ENGINES, NOBODY, *(other for engine in ENGINES.values() for other in engine.names)])
    meant = list(dict.fromkeys(next((key for key, engine in ENGINES.items() if n in engine.names), n) for n in near))
    raise UnknownName("engine", name, meant or [*ENGINES, NOBODY])


SERVERS = {name: engine.server for name, engine in ENGINES.items() if engine.server}
OWN_SERVER = "halfbyte"
"""In place of an engine: the server that halfbyte has itself."""


def server_named(name: str) -> str:
    """The key of an engine whose server is started here, under any spelling. Raises UnknownName, and BadRequest for
    other engines."""
    if name.lower() == OWN_SERVER:
        return OWN_SERVER
    try:
        engine = engine_named(name)
    except UnknownName:
        raise UnknownName("engine", name, [*SERVERS, OWN_SERVER]) from None
    if engine not in SERVERS:
        raise BadRequest(
            f"halfbyte does not start {ENGINES[engine].title}; it starts {', '.join(SERVERS)}, and --engine "
            f"{OWN_SERVER} is its own server"
        )
    return engine


OURS = "halfbyte"
"""Transformers with halfbyte's linears."""
TIMED = (OURS, "llama.cpp", "vllm")
"""What `bench` runs models in."""


def timed_named(name: str) -> str:
    """One of these, under any spelling. Raises UnknownName, and BadRequest for other engines."""
    if name.lower() == OURS:
        return OURS
    try:
        engine = engine_named(name)
    except UnknownName:
        raise UnknownName("engine", name, TIMED) from None
    if engine not in TIMED:
        raise BadRequest(f"halfbyte does not time {ENGINES[engine].title}; it times {', '.join(TIMED)}")
    return engine
