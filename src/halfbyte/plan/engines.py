"""Which inference engines will load a checkpoint: checked before a run, from names, grids and shapes alone.

The rules are data, one row per engine and container, each with the file it was read in (public snapshots, 2025-10 to
2026-11; nothing was executed but Transformers with compressed-tensors, and vLLM's CPU build: benchmarks/results/vllm.md). A rule that
could not be verified refuses, and so does one that says an engine would round inputs otherwise than the scheme has it, but for finer scales.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.errors import UnknownName
from halfbyte.grids.absmax import AbsmaxGrid
from halfbyte.grids.floats import SIDE, FloatGrid
from halfbyte.grids.grid import AnyScheme
from halfbyte.grids.levels import LevelGrid
from halfbyte.grids.scalar import IntGrid
from halfbyte.models.checkpoint import Weight

Placed = Mapping[Weight, AnyScheme | None]
Code = tuple[int, bool]  # bits, and whether symmetric


@dataclass(frozen=True)
class Kernel:
    """One family of kernels of an engine, and the schemes and shapes that it multiplies by."""

    codes: frozenset[Code]  # integers under inputs in 16 bits
    spans: frozenset[int | str]
    tiles: tuple[tuple[int, int], ...] = ()  # (in, out): a partition must be a multiple of one of these, if there are any
    note: str = ""
    flag: str = ""  # what the command needs for this kernel
    named: str = ""  # all other schemes: a pattern of their names, without the precision of scales
    offer: str = ""  # ... in words
    whole_tiles: bool = False  # shapes that miss the tiles are refused even by an engine that pads others


def named(pattern: str, offer: str, note: str = "", tiles: tuple[tuple[int, int], ...] = (), whole_tiles: bool = False) -> Kernel:
    """A kernel for schemes by their names."""
    return Kernel(NONE, frozenset(), tiles, note, named=pattern, offer=offer, whole_tiles=whole_tiles)


@dataclass(frozen=True)
class Reads:
    """How an engine reads one container."""

    kernels: tuple[Kernel, ...]  # fastest first; a grid runs on the first that takes it
    experts: frozenset[Code] = frozenset()  # what numbered experts (experts.7.up_proj) may be
    named_experts: tuple[str, ...] = ()  # ... and other schemes: patterns of their names
    whole: bool = False  # no matrix is split: no tensor parallelism
    spanned: str = ""  # what is to be known of blocks that span rows
    pads: bool = False  # shapes that miss the tiles are padded, not refused
    fuses: bool = True  # q, k, v and gate, up become one matrix each, so each set has one grid
    mixes: bool = True  # several grids in one checkpoint
    one_kernel: bool = False  # ... but only such as run on the same kernel
    base_experts: bool = False  # rules per module do not reach experts: all of them get the commonest grid
    keeps: str = "any"  # which matrices of a block may stay in 16 bits: "any", "unfused" (not q, k, v, gate, up) or "none"
    head: bool = False  # a quantized lm_head
    transposed: bool = False  # GPT-2's Conv1D
    everything: bool = False  # whatever the container holds, wherever it is
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    command: str
    default: str
    reads: Mapping[str, Reads]
    otherwise: str  # what would work, said of a container that is not in `reads`
    parallel: bool = True


@dataclass(frozen=True)
class Verdict:
    engine: str
    loads: bool
    reasons: tuple[str, ...]  # why not, and what would work; empty when it loads
    notes: tuple[str, ...]  # true either way
    tensor_parallel: tuple[int, ...]  # of 1, 2, 4, 8: what groups, packing and tiles permit; the number of heads may permit fewer
    command: str | None  # serves the folder {path}


class Layout(NamedTuple):
    """What tensor parallelism asks of a matrix."""

    scheme: AnyScheme
    row: bool
    out: int
    width: int
    together: int  # out-features of the matrix that it is fused into


DEGREES = (1, 2, 4, 8)
NONE: frozenset[Code] = frozenset()
SYMMETRIC = frozenset({(4, True), (8, True)})
INT4 = frozenset({(4, True), (4, False)})
PACKED = frozenset((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False))
ANY = frozenset((bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))
ODD = frozenset((bits, True) for bits in (2, 3, 5, 6, 7))
# Marlin's groups: vllm-project/vllm model_executor/layers/quantization/utils/marlin_utils.py; SGLang and TGI have the same.
GROUPS: frozenset[int | str] = frozenset({32, 64, 128})
SPANS = GROUPS | {"channel"}
# Marlin's tiles: either (vllm marlin_utils.py marlin_padded_nk; TGI layers/marlin/gptq.py _check_valid_shape), or the first alone
# (sglang awq/schemes/awq_marlin.py verify_marlin_supports_shape).
TILES = ((128, 64), (64, 128))
SIXTEENS = ((16, 16),)
"""Tiles of products of 8 bits (vllm csrc/quantization/w8a8/cutlass; sgl-kernel csrc/gemm)."""
TURING = "4 and 8 bits run on Marlin or Machete kernels: an NVIDIA GPU of compute capability 7.5 or later"
AMPERE = "runs on Marlin kernels: an NVIDIA GPU of compute capability 8.0 or later"
HUMMING = "2, 3, 5, 6 and 7 bits need vLLM of mid-2026 or later and its Humming kernels (NVIDIA only): read in its source, not run"
EXLLAMA = "runs on the slower exllama kernel, in float16 only"
BITSANDBYTES = "needs the package bitsandbytes, 0.46.1 or later"
SPANNED = "bitsandbytes 0.50 decodes it wrongly on CPUs (not on GPUs), as its blocks span rows; smaller ones would not"
BLOCKS_AND_BYTES = named(r"(nf4|fp4)-[^/]*|llm-int8/llm-int8", "nf4 and fp4 in blocks, and int8-channel as LLM.int8()")
FP8_WEIGHTS = "FP8 weights alone run on Marlin kernels: an NVIDIA GPU of compute capability 8.0 or later"
FP8_ROWS = named(r"fp8-e4m3-(channel|tensor)", "fp8-e4m3 per channel, tensor", FP8_WEIGHTS, TILES[:1])
INPUTS_IN_FP8 = "the engine rounds inputs to FP8 on GPUs of compute capability 8.9 or later; older ones leave inputs in 16 bits"
FP8_ROUNDED = "fp8-e4m3-channel/fp8-e4m3-token, fp8-e4m3-tensor/fp8-e4m3-static"
FP8_BLOCKS = named(r"fp8-e4m3-block/fp8-e4m3-g128", "fp8-e4m3-block/fp8-e4m3-g128", INPUTS_IN_FP8)
FP8_LOADED = named(
    r"fp8-e4m3-(block/fp8-e4m3-g128|tensor/fp8-e4m3-(token|static))", "fp8-e4m3-block/fp8-e4m3-g128, fp8-e4m3-tensor/fp8-e4m3-token or -static", INPUTS_IN_FP8
)
MX_INPUTS = "vLLM rounds inputs to {0} on Blackwell whatever the config says; older GPUs (compute capability 8.0 or later) leave them in 16 bits"
NVFP4_INPUTS = "4-bit products need an NVIDIA GPU of compute capability 10.0 or later; older ones (7.5 or later) leave inputs in 16 bits"
W4A8_FP8 = "needs an NVIDIA GPU of compute capability 9.0 exactly (Hopper), where vLLM also rounds the scales of groups to FP8"
W4A8_INT = "int4 under int8 inputs runs on Arm CPUs and Intel GPUs only; on Hopper, int4-g128/fp8-e4m3-token does"
FP8_EXPERTS = ("fp8-e4m3-block/fp8-e4m3-g128", "fp8-e4m3-tensor/fp8-e4m3-token", "fp8-e4m3-tensor/fp8-e4m3-static")
INPUTS_IN_INT8 = "products of int8 run on GPUs of compute capability 7.5 or later"
MAINTAINED = ("TGI is in maintenance mode", "computes in float16")

# What engines fuse: packed_modules_mapping of vllm model_executor/models/{llama,mixtral,qwen3_5}.py.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
# Split along `in` in tensor parallelism: RowParallelLinear in vllm model_executor/models/*.py. All others are split along `out`.
ROW = re.compile(r"(^|\.)(o_proj|down_proj|out_proj|c_proj|wo|w2|fc2|fc_out|dense_4h_to_h|attention\.dense|self_attn\.dense)$")
EXPERT = re.compile(r"\.experts\.\d+\.")

# Paths: vllm/ of vllm-project/vllm; python/sglang/srt/ of sgl-project/sglang; server/text_generation_server/ of
# huggingface/text-generation-inference. (quantization) is model_executor/layers/quantization in vLLM, layers/quantization in SGLang.
VLLM = {
    # (quantization)/compressed_tensors/schemes/compressed_tensors_wNa16.py: symmetric 2 to 8 bits, zero points at 4 and 8; of those
    # only Hopper's Machete and the package conch have 8 (model_executor/kernels/linear/mixed_precision/*.py can_implement);
    # requirements/cuda.txt: humming-kernels; models/gpt2.py transposes tensors named .weight only. lm_head: get_quant_method in
    # compressed_tensors.py asks for a target that names it, and "Linear" does not.
    "compressed-tensors": Reads(
        (
            Kernel(SYMMETRIC | INT4, SPANS, TILES, TURING),
            Kernel(ODD, SPANS, note=HUMMING),
            # schemes/compressed_tensors_{w8a16_fp8,w4a4_nvfp4}.py; _get_scheme_from_parts in compressed_tensors.py.
            FP8_ROWS,
            named(r"fp8-e4m3-block", "fp8-e4m3-block", "fp8-e4m3-block with 16-bit inputs needs vLLM of 2026", TILES),
            named(r"nvfp4-global", "nvfp4-global", "NVFP4 weights alone run on Marlin kernels: compute capability 7.5 or later", TILES),
            # schemes/compressed_tensors_{w4a4_mxfp4,w8a8_mxfp8}.py do not look at input_activations: kernels decide, in the order of
            # kernels/linear/__init__.py, where FlashInfer's (Blackwell) round inputs and Marlin's, which come next, do not.
            named(r"mxfp4(/mxfp4)?", "mxfp4", MX_INPUTS.format("MXFP4"), TILES),
            named(r"mxfp8-e4m3(/mxfp8-e4m3)?", "mxfp8-e4m3", MX_INPUTS.format("MXFP8"), TILES),
            # schemes/compressed_tensors_w8a8_int8.py (symmetric weights; inputs per token or stored, with zero points or not).
            named(r"int8-(channel|tensor)/int8-(token|static)(-asym)?", "int8-channel/int8-token or -static, and -asym", INPUTS_IN_INT8, SIXTEENS),
            # schemes/compressed_tensors_w8a8_fp8.py: per tensor, a fused matrix is rounded again to the largest of its scales.
            named(r"fp8-e4m3-(channel|tensor)/fp8-e4m3-(token|static)", FP8_ROUNDED, INPUTS_IN_FP8),
            named(r"fp8-e4m3-(channel|tensor)/fp8-e4m3-tensor", "", f"{INPUTS_IN_FP8}; vLLM finds a scale for each token, not one for all"),
            FP8_BLOCKS,
            # schemes/compressed_tensors_w4a4_nvfp4.py: fused matrices share the largest divisor, and warn if theirs differ.
            named(r"nvfp4-global/nvfp4", "nvfp4-global/nvfp4", NVFP4_INPUTS, TILES),
            # schemes/compressed_tensors_w4a8_fp8.py and kernels/linear/mixed_precision/cutlass.py: compute capability 9.0 exactly.
            named(r"int4-g128/fp8-e4m3-token", "int4-g128/fp8-e4m3-token", W4A8_FP8, ((128, 128),), whole_tiles=True),
            # schemes/compressed_tensors_w4a8_int.py: of kernels/linear/mixed_precision, dynamic_4bit.py and xpu.py take signed 4 bits in bytes.
            named(r"int4-(channel|g32|g64|g128)/int8-token(-asym)?", "int4-g128/int8-token", W4A8_INT),
        ),
        experts=SYMMETRIC,
        # compressed_tensors_moe.py get_moe_method: FP8 has experts with quantized inputs only; int8 per channel and token only.
        named_experts=(
            *("nvfp4-global", "nvfp4-global/nvfp4", "mxfp4", "mxfp4/mxfp4", "mxfp8-e4m3", "mxfp8-e4m3/mxfp8-e4m3", "int8-channel/int8-token"),
            *("fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-tensor/fp8-e4m3-static", "fp8-e4m3-block/fp8-e4m3-g128", "int4-g128/fp8-e4m3-token"),
        ),
        pads=True,
        transposed=True,
    ),
    # (quantization)/auto_gptq.py TYPE_MAP; utils/gptq_utils.py get_dynamic_override (experts have one name, mlp.experts). Pull request
    # 38288 (mid-2026) took away gptq.py, whose exllama kernel ran zero points, 2 and 3 bits.
    "gptq": Reads((Kernel(SYMMETRIC, SPANS, TILES),), experts=SYMMETRIC, pads=True, base_experts=True, head=True, transposed=True, notes=(TURING,)),
    # (quantization)/auto_awq.py. lm_head: only if the config says "lm_head", which ours does not.
    "awq": Reads((Kernel(INT4, SPANS, TILES),), experts=INT4, pads=True, mixes=False, base_experts=True, transposed=True, notes=(TURING,)),
    # (quantization)/fp8.py Fp8Config, Fp8LinearMethod, Fp8MoEMethod; per tensor, a fused matrix is rounded again to the largest scale.
    "fp8": Reads((FP8_LOADED,), named_experts=FP8_EXPERTS, mixes=False),
    # model_executor/model_loader/bitsandbytes_loader.py: _verify_model_compatibility, _fuse_moe_quant_states (NF4 only);
    # (quantization)/bitsandbytes.py: is_layer_skipped_bnb looks for the kept names in fused names. Found without flags since pull
    # request 16027 (April 2025).
    "bitsandbytes": Reads((BLOCKS_AND_BYTES,), named_experts=("nf4-.*",), mixes=False, keeps="unfused", whole=True, notes=(BITSANDBYTES,)),
}
SGLANG = {
    # (quantization)/compressed_tensors/schemes/compressed_tensors_wNa16.py; a quantized lm_head gave noise in silence (issue 35358).
    # schemes/compressed_tensors_w8a16_fp8.py has rows and tensors, no blocks. schemes/compressed_tensors_w8a8_int8.py rounds inputs per
    # token without zero points whatever the config says, so stored scales and zero points would be ignored; its scales are of channels.
    # _get_scheme_from_parts goes by the format of the whole checkpoint, which several formats do not have.
    "compressed-tensors": Reads(
        (
            Kernel(SYMMETRIC | INT4, SPANS, TILES[:1], AMPERE),
            FP8_ROWS,
            named(r"int8-channel/int8-token", "int8-channel/int8-token", "products of int8 run on GPUs of compute capability 8.0 or later", SIXTEENS),
            named(r"fp8-e4m3-(channel/fp8-e4m3-token|tensor/fp8-e4m3-(token|static))", FP8_ROUNDED, INPUTS_IN_FP8, SIXTEENS),
            named(r"nvfp4-global/nvfp4", "nvfp4-global/nvfp4", "4-bit products need an NVIDIA GPU of compute capability 10.0 or later"),
        ),
        experts=SYMMETRIC,
        named_experts=("fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-tensor/fp8-e4m3-static", "nvfp4-global/nvfp4"),
        one_kernel=True,
    ),
    # (quantization)/gptq/gptq.py: GPTQMarlinConfig, or else GPTQConfig (float16, no experts); gptq/schemes/gptq_linear.py.
    "gptq": Reads(
        (Kernel(SYMMETRIC, SPANS, TILES[:1], AMPERE), Kernel(PACKED, SPANS, note=EXLLAMA, flag=" --dtype float16")),
        experts=SYMMETRIC,
        one_kernel=True,
        base_experts=True,
        head=True,
    ),
    # (quantization)/fp8.py Fp8Config, Fp8LinearMethod.
    "fp8": Reads((FP8_LOADED,), named_experts=FP8_EXPERTS, mixes=False),
    # (quantization)/awq/awq.py: is_layer_skipped_awq looks for the kept names in fused names.
    "awq": Reads((Kernel(INT4, SPANS, TILES[:1], AMPERE),), experts=INT4, mixes=False, base_experts=True, keeps="unfused"),
}
TRANSFORMERS = {
    # transformers/quantizers/quantizer_compressed_tensors.py; compressed_tensors/quantization/lifecycle/apply.py: nn.Linear only.
    # Experts are 3-D parameters (models/qwen3_moe/modeling_qwen3_moe.py).
    "compressed-tensors": Reads(
        (
            Kernel(ANY, SPANS | {"any group", "tensor"}),
            named(r"fp8-e4m3-[^/]*|mxfp8-e4m3|mxfp6-e2m3|mxfp4|nvfp4-global", "fp8-e4m3, mxfp8-e4m3, mxfp6-e2m3, mxfp4, nvfp4-global"),
            # compressed_tensors/quantization/lifecycle/forward.py rounds inputs and multiplies in 16 bits.
            named(
                r"(int[2-8]|fp8-e4m3)-[^/]*/(int[2-8]|fp8-e4m3)-(token|tensor|static|g\d+)(-asym)?|mxfp8-e4m3/mxfp8-e4m3|mxfp4/mxfp4|nvfp4-global/nvfp4",
                "integers and floats under inputs rounded in any way",
                "inputs are rounded, and multiplied in 16 bits",
            ),
        ),
        fuses=False,
        head=True,
        notes=("needs the package compressed-tensors, which decompresses the weights: it saves no memory or time at run time",),
    ),
    # transformers/quantizers/quantizer_gptq.py, huggingface/optimum optimum/gptq/quantizer.py convert_model: all layers of the blocks
    # get one setting (`dynamic` is not read), lm_head none; Conv1D is replaced too.
    "gptq": Reads((Kernel(PACKED, SPANS),), fuses=False, mixes=False, keeps="none", transposed=True, notes=("needs gptqmodel and optimum",)),
    # transformers/quantizers/quantizer_awq.py, integrations/awq.py: nn.Linear only, and not the head.
    "awq": Reads((Kernel(INT4, SPANS),), fuses=False, mixes=False, notes=("needs the packages gptqmodel and accelerate; float16 on GPUs",)),
    # transformers/quantizers/quantizer_finegrained_fp8.py, integrations/finegrained_fp8.py: nn.Linear, and experts that it fuses itself.
    # Without a GPU it decodes them.
    "fp8": Reads((FP8_BLOCKS,), named_experts=(FP8_BLOCKS.named,), fuses=False, mixes=False),
    # transformers/quantizers/quantizer_bnb_{4,8}bit.py, integrations/bitsandbytes.py: nn.Linear and Conv1D, and the head if it is not
    # among the skipped modules.
    "bitsandbytes": Reads((BLOCKS_AND_BYTES,), fuses=False, mixes=False, head=True, transposed=True, spanned=SPANNED, notes=(BITSANDBYTES,)),
}
TGI = {
    # layers/compressed_tensors/{loader,wna16_int}.py (zero points are looked for as .qzeros); the head: layers/tensor_parallel.py.
    # w8a8_int.py finds scales of tokens even where some are stored; w8an_fp.py takes rows and tensors, and blocks of neither kind;
    # loader.py goes by the format of the whole checkpoint.
    "compressed-tensors": Reads(
        (
            Kernel(SYMMETRIC, SPANS, TILES, AMPERE),
            named(r"int8-(channel|tensor)/int8-token(-asym)?", "int8-channel/int8-token, and -asym", INPUTS_IN_INT8, SIXTEENS),
            named(r"fp8-e4m3-(channel/fp8-e4m3-token|tensor/fp8-e4m3-(token|static))", FP8_ROUNDED, INPUTS_IN_FP8, SIXTEENS),
        ),
        one_kernel=True,
        notes=MAINTAINED[:1],
    ),
    # utils/quantization.py (no `dynamic`), layers/marlin/gptq.py, layers/gptq/triton.py (2, 4, 8 bits).
    "gptq": Reads(
        (Kernel(SYMMETRIC, SPANS, TILES, AMPERE), Kernel(PACKED - {(3, True), (3, False)}, SPANS, note="runs on slower exllama or Triton kernels")),
        mixes=False,
        keeps="none",
        notes=MAINTAINED,
    ),
    # layers/marlin/gptq.py: GPTQMarlinWeightsLoader knows no kept modules, and divides by the group size, -1 for channels.
    "awq": Reads((Kernel(INT4, GROUPS, TILES, AMPERE),), mixes=False, keeps="none", notes=MAINTAINED),
}
ENGINES: dict[str, Engine] = {
    "vllm": Engine("vllm serve {path}", "compressed-tensors", VLLM, "write compressed-tensors, gptq or awq"),
    "sglang": Engine("python -m sglang.launch_server --model-path {path}", "gptq", SGLANG, "write gptq, compressed-tensors or awq"),
    "transformers": Engine(
        'AutoModelForCausalLM.from_pretrained("{path}", device_map="auto")',
        "compressed-tensors",
        TRANSFORMERS,
        "write compressed-tensors, gptq or awq",
        parallel=False,
    ),
    "tgi": Engine("text-generation-launcher --model-id {path}", "gptq", TGI, "write gptq, compressed-tensors or awq"),
    # NVIDIA/TensorRT-LLM tensorrt_llm/_torch/model_config.py load_hf_quant_config; the scripts that converted AutoGPTQ and AutoAWQ
    # files went with its TensorRT backend.
    "tensorrt-llm": Engine(
        "trtllm-serve {path}",
        "compressed-tensors",
        {
            # models/quant_config_utils.py: FP8 per channel and token or in blocks, no integers. Its NVFP4 and MXFP4 are for models that
            # rename weight_packed themselves.
            "compressed-tensors": Reads((named(r"fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-channel/fp8-e4m3-token", INPUTS_IN_FP8, SIXTEENS), FP8_BLOCKS)),
            # model_config.py load_hf_quant_config: DeepSeek's blocks, whatever the config says of modules that are kept.
            "fp8": Reads((FP8_BLOCKS,), mixes=False, keeps="none"),
        },
        "it loads FP8, NVFP4, MXFP4 and ModelOpt checkpoints; serve integer weights with vllm or sglang",
    ),
    # src/llama-model-loader.cpp: every type of ggml, whichever tensor has it.
    "llama.cpp": Engine("llama-server -m {path}", "gguf", {"gguf": Reads((), everything=True)}, "write gguf", parallel=False),
    # The Modelfile is written beside the GGUF.
    "ollama": Engine("ollama create {name} -f {modelfile}", "gguf", {"gguf": Reads((), everything=True)}, "write gguf", parallel=False),
}


def default_container(engine: str) -> str:
    """The container that the engine loads best. Raises UnknownName."""
    return _engine(engine).default


def multiplies(engine: str, container: str, scheme: AnyScheme) -> bool:
    """Whether the engine has a kernel for a scheme from a container, for some shapes. Raises UnknownName."""
    reads = _engine(engine).reads.get(container)
    return reads is not None and (reads.everything or _kernel(reads, scheme) is not None)


def verdicts(container: str, placed: Placed, model_type: str) -> list[Verdict]:
    return [check(engine, container, placed, model_type) for engine in ENGINES]


def check(engine: str, container: str, placed: Placed, model_type: str) -> Verdict:
    """Whether `engine` loads these weights on these grids (None: kept in 16 bits). Raises UnknownName."""
    spec = _engine(engine)
    reads = spec.reads.get(container)
    if reads is None:
        what = "does not read" if container in ("compressed-tensors", "gptq", "awq") else "was not seen to load"
        return Verdict(engine, False, (f"{engine} {what} {container}: {spec.otherwise}",), (), (), None)
    if reads.everything:
        return Verdict(engine, True, (), reads.notes, (), spec.command)
    quantized = {w: g for w, g in placed.items() if g is not None}
    reasons = [*_grids(engine, container, reads, quantized), *_places(engine, container, reads, placed, model_type)]
    reasons += _experts(engine, container, reads, placed)
    kernels = [k for k in reads.kernels if any(_kernel(reads, g) is k for g in set(quantized.values()))]
    notes = [*reads.notes, *(k.note for k in kernels if k.note)]
    if reads.spanned and (odd := [w for w, g in quantized.items() if isinstance(g.weight, AbsmaxGrid) and w.shape[1] % g.weight.group]):
        notes.append(f"{odd[0].name} ({odd[0].shape[0]} x {odd[0].shape[1]}, {len(odd)} such): {reads.spanned}")
    if any(w.expert is not None and g is None for w, g in placed.items()):
        notes.append(f"experts that are one 3-D tensor stay in 16 bits; that {engine} finds them so was not verified")
    degrees: list[int] = []
    if not reasons:
        layouts = _layouts(reads, quantized)
        whole = {d: _misfit(reads, layouts, d, tiles=False) for d in DEGREES}
        tiled = {d: _misfit(reads, layouts, d, tiles=True) for d in DEGREES}
        if whole[1] or (tiled[1] and not reads.pads):
            reasons.append(f"{whole[1] or tiled[1]}, which {engine} cannot hold: choose another group size, or keep it in 16 bits")
        elif tiled[1]:
            notes.append(f"{tiled[1]}: vLLM pads such shapes since pull request 45295 (June 2026), older releases refuse them")
        degrees = [1] if reads.whole else [d for d, misfit in (whole if tiled[1] else tiled).items() if misfit is None]
    if reasons:
        return Verdict(engine, False, tuple(reasons), tuple(notes), (), None)
    return Verdict(engine, True, (), tuple(notes), tuple(degrees) if spec.parallel else (), spec.command + "".join(k.flag for k in kernels))


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    return ENGINES[name]


def _name(scheme: AnyScheme) -> str:
    """The name of a scheme without the precision of its scales, which containers choose."""
    return re.sub(r"-(bf16|fp16|fp32)(?=/|$)", "", str(scheme))


def _kernel(reads: Reads, scheme: AnyScheme) -> Kernel | None:
    grid = scheme.weight
    if scheme.input or not isinstance(grid, IntGrid):
        return next((k for k in reads.kernels if k.named and re.fullmatch(k.named, _name(scheme))), None)
    spans = {grid.span, "any group"} if grid.block else {grid.span}
    return next((k for k in reads.kernels if (grid.bits_per_code, grid.symmetric) in k.codes and spans & k.spans), None)


def _grids(engine: str, container: str, reads: Reads, quantized: Mapping[Weight, AnyScheme]) -> Iterator[str]:
    """What is wrong with the grids, wherever they are."""
    grids = sorted(set(quantized.values()), key=str)
    for grid in grids:
        if _kernel(reads, grid) is None:
            yield f"{engine} has no kernel for {grid} in {container}; it takes {_offer(reads)}"
    if len(grids) > 1 and not reads.mixes:
        yield f"{engine} reads one grid from {container}, not {', '.join(map(str, grids))}: use one, or write compressed-tensors"
    kernels = {_kernel(reads, grid) for grid in grids} - {None}
    if reads.one_kernel and len(kernels) > 1:
        yield f"{engine} runs all of a {container} checkpoint on one kernel, which does not exist for {', '.join(map(str, grids))}: use one grid"


def _offer(reads: Reads) -> str:
    offers = []
    offers += [kernel.offer for kernel in reads.kernels if kernel.offer]
    for kernel in (k for k in reads.kernels if k.codes):
        codes = [f"int{b}" + ("" if (b, False) in kernel.codes else " (symmetric)") for b in sorted({b for b, _ in kernel.codes})]
        spans = sorted(s for s in kernel.spans if isinstance(s, int)) + sorted(s for s in kernel.spans if isinstance(s, str))
        offers.append(f"{', '.join(codes)} per {', '.join(f'g{s}' if isinstance(s, int) else s for s in spans)}")
    return "; or ".join(offers)


def _places(engine: str, container: str, reads: Reads, placed: Placed, model_type: str) -> Iterator[str]:
    """What is wrong with where the grids are."""
    quantized = [w for w, g in placed.items() if g is not None]
    if fused := [w.name for w in quantized if w.expert is not None]:
        yield f"{engine} holds fused experts as one 3-D tensor and knows no '{fused[0]}' ({len(fused)} such): keep the experts in 16 bits"
    if heads := [w.name for w in quantized if w.block is None and not reads.head]:
        yield f"{engine} does not load a quantized {heads[0]} from {container} as it is written here: keep it in 16 bits"
    # vLLM turns what is called .weight, as all of 8 bits is but integers under 16-bit inputs (models/gpt2.py).
    conv1d = {w.name: g for w, g in placed.items() if g and w.transposed and w.expert is None}
    turned = [name for name, g in conv1d.items() if not reads.transposed or isinstance(g.weight, FloatGrid) or g.input]
    if turned:
        yield f"{turned[0]} of {model_type} is a Conv1D, which {engine} is not known to load from {container}: keep it in 16 bits, or use vllm"
    for names, grids in _siblings(placed).values():
        if reads.fuses and len(set(grids)) > 1:
            found = ", ".join(f"{n}: {g or '16 bits'}" for n, g in zip(names, grids, strict=True))
            yield f"{engine} fuses these into one matrix, so they need one grid, or all 16 bits ({found})"
            break
    kept = [w for w, g in placed.items() if g is None and w.block is not None]
    if reads.keeps == "unfused":
        kept = [w for w in kept if any(w.name.rpartition(".")[2] in names for names in FUSED)]
    if quantized and kept and reads.keeps != "any":
        yield f"{engine} does not see in {container} that {kept[0].name} is kept ({len(kept)} such): quantize it, or write compressed-tensors"


def _experts(engine: str, container: str, reads: Reads, placed: Placed) -> Iterator[str]:
    experts = {w: g for w, g in placed.items() if EXPERT.search(w.name)}
    grids = Counter(g for g in placed.values() if g is not None)
    if not experts or not grids:
        return
    main = grids.most_common(1)[0][0]
    known = ["int{}{}".format(bits, "" if symmetric else "-asym") for bits, symmetric in sorted(reads.experts)]
    known += [name.removesuffix("-.*") for name in reads.named_experts]
    for w, g in experts.items():
        if w.expert is None and g is not None and not _is_expert(reads, g):
            instead = f"use {' or '.join(known)}" if known else "keep the experts in 16 bits"
            yield f"{engine} is not known to load {w.name} on {g} from {container}: {instead}"
            break
    if reads.base_experts and (odd := [w for w, g in experts.items() if g != main]):
        yield f"{engine} takes all experts in {container} to be {main}, unlike {odd[0].name}: make them so, or write compressed-tensors"
    blocks: defaultdict[str | None, set[AnyScheme | None]] = defaultdict(set)
    for w, g in experts.items():
        blocks[w.block].add(g)
    if uneven := [block for block, found in blocks.items() if len(found) > 1]:
        yield f"{engine} loads the experts of {uneven[0]} as one tensor, so they need one grid, or all 16 bits"


def _is_expert(reads: Reads, scheme: AnyScheme) -> bool:
    grid = scheme.weight
    if isinstance(grid, IntGrid) and not scheme.input:
        return (grid.bits_per_code, grid.symmetric) in reads.experts
    return any(re.fullmatch(name, _name(scheme)) for name in reads.named_experts)


def _siblings(placed: Placed) -> dict[tuple[str, int], tuple[list[str], list[AnyScheme | None]]]:
    """Names and grids of each set of matrices that engines fuse."""
    sets: dict[tuple[str, int], tuple[list[str], list[AnyScheme | None]]] = {}
    for weight, grid in placed.items():
        prefix, _, last = weight.name.rpartition(".")
        for index, names in enumerate(FUSED):
            if last in names:
                found, grids = sets.setdefault((prefix, index), ([], []))
                found.append(weight.name)
                grids.append(grid)
    return sets


def _layouts(reads: Reads, quantized: Mapping[Weight, AnyScheme]) -> dict[Layout, str]:
    """Every kind of matrix there is, and the first that is so."""
    sizes = {w.name: w.shape[0] for w in quantized}
    together = {name: sum(sizes[n] for n in names) for names, _ in _siblings(quantized).values() for name in names} if reads.fuses else {}
    found: dict[Layout, str] = {}
    for w, scheme in quantized.items():
        if isinstance(scheme.weight, IntGrid | FloatGrid | LevelGrid):
            out, width = w.shape
            found.setdefault(Layout(scheme, bool(ROW.search(w.name)), out, width, together.get(w.name, out)), w.name)
    return found


def _misfit(reads: Reads, layouts: Mapping[Layout, str], degree: int, tiles: bool) -> str | None:
    """The first matrix that cannot be split over `degree` devices, and why: groups and packing, and tiles if asked."""
    for (scheme, row, out, width, together), name in layouts.items():
        grid = scheme.weight
        split = width if row else out
        if split % degree or (degree > 1 and isinstance(grid, IntGrid) and not scheme.input and split // degree * grid.bits_per_code % 32):
            return f"{name} ({out} x {width}) does not split into {degree} parts of whole 32-bit words"
        if isinstance(grid, FloatGrid) and grid.span == "block" and (degree > 1 or together != out) and split // degree % SIDE:
            return f"{name} ({out} x {width}) does not split into {degree} parts of whole blocks of {SIDE} x {SIDE}"
        width, together = (width // degree, together) if row else (width, together // degree)
        if grid.block and width % grid.block:
            return f"{name} has {width} in-features, no multiple of the group {grid.block}"
        kernel = _kernel(reads, scheme)
        shapes = kernel.tiles if kernel and (tiles or kernel.whole_tiles) else ()
        if shapes and all(width % a or together % b for a, b in shapes):
            return f"{name} ({together} x {width} as fused) is no multiple of {' or '.join(f'{b} x {a}' for a, b in shapes)} (out x in)"
    return None
