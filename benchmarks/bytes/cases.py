"""Which runs `same_bytes.py` compares: command lines over inputs that have names, so that any revision can run them.

Nothing here is read from the package: were the lists its own, a revision that lost a grid would lose its cases too.

`demo`, `small`, `families/llama`... are inputs (`inputs.py`); `sources/ct-int4-g32`... are made by the revision itself
when a case first needs them. What a case writes under `out/`, and what its commands print as JSON, is compared.
Three words are no commands of halfbyte: `logits PATH` loads a checkpoint and runs it, `killed COMMAND...` ends the
command with SIGKILL in the middle and then runs it again, `same A B` fails where two outputs of the case differ.
"""

from collections.abc import Iterator
from typing import NamedTuple

Command = tuple[str, ...]


class Case(NamedTuple):
    """Command lines, one after another, and what they are called."""

    name: str
    commands: tuple[Command, ...]
    may_refuse: bool = False
    """Whether a refusal is a result: where pairs are tried out. Elsewhere it means that the case is spelled wrongly."""

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]


INTEGERS = [f"int{bits}-{span}" for bits in range(2, 9) for span in ("g32", "g64", "g128", "channel", "tensor")]
INTEGERS += [f"int{bits}-{span}-asym" for bits in range(2, 9) for span in ("g32", "g64", "g128", "channel")]
FLOATS = (
    "fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e4m3-block", "mxfp4", "mxfp8-e4m3", "mxfp6-e2m3", "nvfp4",
)  # fmt: skip
WITH_INPUTS = (
    "fp8-e4m3-channel/fp8-e4m3-token", "fp8-e4m3-block/fp8-e4m3-g128", "mxfp8-e4m3/mxfp8-e4m3",
    "int8-channel/int8-token", "int4-g128/int8-token", "int4-g128/fp8-e4m3-token", "int4-channel/int4-token",
    "nvfp4/nvfp4", "mxfp4/mxfp4",
)  # fmt: skip
SCHEMES = {
    "compressed-tensors": (*INTEGERS, *FLOATS, *WITH_INPUTS),
    "gptq": tuple(name for name in INTEGERS if name[3] in "2348" and "tensor" not in name),
    "awq": tuple(name for name in INTEGERS if name[3] == "4" and "tensor" not in name),
    "bitsandbytes": (
        "nf4-g64", "nf4-g64-double", "nf4-g128", "fp4-g64", "fp4-g64-double", "llm-int8", "int8-channel",
    ),
    "fp8": ("fp8-e4m3-tensor", "fp8-e4m3-block", "fp8-e4m3-block/fp8-e4m3-g128", "fp8-e5m2-tensor", "fp8-e5m2-block"),
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16")
PRESETS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M",
    "IQ4_NL", "IQ4_XS", "MXFP4_MOE",
)  # fmt: skip
TYPES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0", "iq4_nl",
    "iq4_xs", "mxfp4", "nvfp4", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs",
)  # fmt: skip
WHOLE_DEMO = {
    "int4-g128": "compressed-tensors",
    "int3-g64-asym": "gptq",
    "int4-g128-asym": "awq",
    "nf4-g64": "bitsandbytes",
    "fp8-e4m3-tensor": "fp8",
}

CALIBRATED = ("imatrix", "gptq", "gptaq", "awq", "awq+gptq")
MET_BY_ALL = {
    "int3-g64-asym": "gptq",
    "int4-g128-asym": "awq",
    "int5-channel": "compressed-tensors",
    "nf4-g64-double": "bitsandbytes",
    "llm-int8": "bitsandbytes",
    "fp8-e4m3-block": "fp8",
    "fp8-e4m3-tensor/fp8-e4m3-static": "fp8",
    "nvfp4": "compressed-tensors",
    "mxfp4/mxfp4": "compressed-tensors",
    "int8-channel/int8-static": "compressed-tensors",
    **dict.fromkeys(("Q4_K_M", "Q2_K", "Q3_K_S", "IQ2_XXS", "IQ3_S", "IQ4_XS", "Q5_0"), "gguf"),
}
SMOOTHED = ("smoothquant", "smoothquant+gptq")
MET_BY_SMOOTHED = {
    "int8-channel/int8-token": "compressed-tensors",
    "int8-channel/int8-static": "compressed-tensors",
    "int4-channel/int4-token": "compressed-tensors",
    "fp8-e4m3-tensor/fp8-e4m3-static": "fp8",
    "nvfp4/nvfp4": "compressed-tensors",
}

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi", "gpt2", "gptj", "bigcode", "opt",
    "gpt_neox", "bloom", "stablelm", "stablelm-parallel", "falcon", "falcon-new", "nemotron", "cohere", "olmo2", "glm4",
    "lfm2", "mamba", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4",
    "qwen3_5_moe",
)  # fmt: skip
GOLDENS = (
    "awq-gemm", "ct-int3-g64-asym", "ct-int4-g32", "ct-int8-channel", "gptq-desc-act", "gptq-v1", "gptq-v1-asym",
    "gptq-v1-int3-asym", "gptq-v2-asym", "modelopt-fp8", "modelopt-fp8-block", "modelopt-fp8-channel",
    "modelopt-mxfp8", "modelopt-nvfp4", "modelopt-nvfp4-weights",
)  # fmt: skip
"""Folders that other tools wrote; one has its in-features in activation order."""
CONTAINERS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "gguf")

FEW: Command = ("--calibration", "text.txt", "--samples", "3", "--length", "32")
"""For models that read single bytes."""
DEMO_FEW: Command = ("--samples", "3", "--length", "64")
NO_ENGINE: Command = ("--engine", "none")
"""What no engine loads is written as well."""


def output(to: str, name: str = "out/model") -> str:
    return f"{name}.gguf" if to == "gguf" else name


def quantized(model: str, method: str, grid: str, to: str, *more: str, out: str = "out/model") -> Command:
    words = ("--method", method, "--grid", grid, "--to", to, *NO_ENGINE, *more)
    return ("quantize", model, "-o", output(to, out), *words)


SOURCES: dict[str, Command] = {
    output(to, f"sources/{name}"): quantized("small", "nearest", grid, to, out=f"sources/{name}")
    for name, grid, to in (
        ("ct-int4-g32", "int4-g32", "compressed-tensors"),
        ("ct-int4-g128-asym", "int4-g128-asym", "compressed-tensors"),
        ("ct-int8", "int8-channel/int8-token", "compressed-tensors"),
        ("ct-fp8", "fp8-e4m3-channel/fp8-e4m3-token", "compressed-tensors"),
        ("ct-nvfp4", "nvfp4/nvfp4", "compressed-tensors"),
        ("ct-mxfp4", "mxfp4", "compressed-tensors"),
        ("gptq-int4-g32", "int4-g32", "gptq"),
        ("gptq-int8-g128-asym", "int8-g128-asym", "gptq"),
        ("awq-int4-g128-asym", "int4-g128-asym", "awq"),
        ("bnb-nf4", "nf4-g64", "bitsandbytes"),
        ("bnb-nf4-double", "nf4-g64-double", "bitsandbytes"),
        ("bnb-int8", "llm-int8", "bitsandbytes"),
        ("fp8-block", "fp8-e4m3-block", "fp8"),
        ("fp8-tensor", "fp8-e4m3-tensor", "fp8"),
        *((name.lower(), name, "gguf") for name in ("Q4_0", "Q8_0", "Q4_K_M", "Q2_K", "IQ3_S", "mxfp4", "BF16")),
    )
}
"""What is converted, dequantized, given a cache... and the command that makes it."""
QUANTIZED = (*(name for name in SOURCES if "bf16" not in name), *(f"goldens/{name}" for name in GOLDENS))


def uncalibrated() -> Iterator[Case]:
    for method in ("nearest", "minmax"):
        for scheme, to in WHOLE_DEMO.items():
            yield Case(f"{method} {scheme} {to} demo", (quantized("demo", method, scheme, to),))
        for to, schemes in SCHEMES.items():
            for scheme in schemes:
                yield Case(f"{method} {scheme} {to} block", (quantized("block", method, scheme, to),))
        for preset in (*PLAIN, *PRESETS):
            yield Case(f"{method} {preset} gguf demo", (quantized("demo", method, preset, "gguf"),))
        for name in TYPES:
            yield Case(f"{method} {name} gguf pure block", (quantized("block", method, name, "gguf", "--pure"),))
    for preset in PRESETS:
        given = quantized("demo", "imatrix", preset, "gguf", "--imatrix", "imatrix.gguf")
        yield Case(f"imatrix {preset} gguf given demo", (given,))


def golden() -> list[Case]:
    """Those whose bytes are the same on every processor that fuses multiplication and addition
    (tests/goldens/bytes.json).

    Not those of NVFP4 with rounded activations, whose stored scale is calibrated whatever the method; nor of scales
    that are sums over a row or a block, in the order that suits a processor's vectors: FP8 by `nearest`, nested scales.
    Nor presets by `nearest`: which types they are made of is seen by `minmax`, and every type by `nearest` as it is.
    """

    def is_golden(name: str) -> bool:
        sums = "-double" in name or (name.startswith("nearest") and "fp8" in name)
        again = name.startswith("nearest") and name.endswith(" gguf demo")
        return not sums and not again and "/nvfp4 " not in name

    return [case for case in uncalibrated() if is_golden(case.name)]


def calibrated() -> Iterator[Case]:
    for method in CALIBRATED:
        for scheme, to in {"int4-g128": "compressed-tensors", "Q4_K_M": "gguf"}.items():
            yield Case(f"{method} {scheme} {to} demo", (quantized("demo", method, scheme, to, *DEMO_FEW),))
        for scheme, to in MET_BY_ALL.items():
            yield Case(f"{method} {scheme} {to} small", (quantized("small", method, scheme, to, *FEW),))
    for method in SMOOTHED:
        yield Case(f"{method} w8a8 demo", (quantized("demo", method, "w8a8", "compressed-tensors", *DEMO_FEW),))
        for scheme, to in MET_BY_SMOOTHED.items():
            yield Case(f"{method} {scheme} {to} small", (quantized("small", method, scheme, to, *FEW),))


def options() -> Iterator[Case]:
    """Words of a recipe that the other cases leave alone."""
    int4 = ("--grid", "int4-g32", *NO_ENGINE)
    gptq, nearest = ("small", "--method", "gptq", *int4, *FEW), ("small", "--method", "nearest", *int4)
    mixed = ("--override", "layers.0.*=int8-channel", "--override", "*o_proj=keep")
    ranges = ("small", "--method", "nearest", "--grid", "fp8-static", *FEW, "--observer")
    chats = ("--calibration", "chats.jsonl", "--samples", "2", "--length", "32")
    for name, words in {
        "alpha": ("small", "--method", "smoothquant", "--grid", "w8a8", "--alpha", "0.7", *FEW),
        "observer-mse": (*ranges, "mse"),
        "observer-percentile": (*ranges, "percentile"),
        "kv": (*gptq, "--kv", "fp8-e4m3"),
        "kv-head": (*nearest, *FEW, "--kv", "fp8-e4m3-head"),
        "skip": (*gptq, "--skip", "down_proj"),
        "override": (*gptq, *mixed),
        "override-nearest": (*nearest, *mixed),
        "head": (*gptq, "--head"),
        "head-nearest": (*nearest, "--head"),
        "smaller-groups": ("families/llama", *nearest[1:3], "--grid", "int4-g128", "--smaller-groups", *NO_ENGINE),
        "shards": (*gptq, "--shard-gb", "0.0003"),
        "shards-nearest": (*nearest, "--shard-gb", "0.0003"),
        "adapter": (*gptq, "--adapter", "adapter"),
        "adapter-nearest": (*nearest, "--adapter", "adapter"),
        "float16": ("small-fp16", *gptq[1:]),
        "float32": ("small-fp32", *nearest[1:]),
        "seed": (*gptq, "--seed", "7"),
        "recipe": ("--recipe", "recipe.yaml"),
        "chats": ("chat", "--method", "gptq", *int4, *chats),
        "repository": (*nearest, "--repository", "org/name"),
    }.items():
        yield Case(f"option {name}", (("quantize", "-o", "out/model", *words),))
    for name, words in {
        "adapter": ("--adapter", "adapter"),
        "override": ("--override", "*down_proj=Q8_0"),
        "head": ("--head",),
    }.items():
        yield Case(f"option {name} gguf", (quantized("small", "gptq", "Q4_K_M", "gguf", *FEW, *words),), True)
    for engine in ("vllm", "transformers", "sglang", "tgi", "tensorrt-llm", "llama.cpp", "ollama", "mlx"):
        out = output("gguf" if engine in ("llama.cpp", "ollama") else "folder")
        plan = ("quantize", "demo", "-o", out, "--engine", engine, "--dry-run", "--json")
        yield Case(f"plan {engine}", (plan,), may_refuse=engine in ("tensorrt-llm", "mlx"))


def families() -> Iterator[Case]:
    for family in FAMILIES:
        model = f"families/{family}"
        yield Case(f"family {family} awq+gptq", (quantized(model, "awq+gptq", "int4-g32", "compressed-tensors", *FEW),))
        nearest = quantized(model, "nearest", "int8-channel", "compressed-tensors")
        yield Case(f"family {family} nearest", (nearest, ("logits", "out/model")))
        yield Case(f"family {family} gguf", (quantized(model, "gptq", "Q8_0", "gguf", *FEW),), may_refuse=True)
        yield Case(f"family {family} kv", (("kv", model, "-o", "out/model", *FEW),), may_refuse=True)


def moves() -> Iterator[Case]:
    """Conversions between all containers, and what else is made of models that are quantized."""
    for source in QUANTIZED:
        for to in CONTAINERS:
            words = ("convert", source, "-o", output(to), "--to", to, *NO_ENGINE)
            yield Case(f"convert {source} {to}", (words,), may_refuse=True)
        foreign = source.startswith("goldens/")
        yield Case(f"dequantize {source}", (("dequantize", source, "-o", "out/model"),))
        yield Case(f"dequantize {source} gguf", (("dequantize", source, "-o", "out/model.gguf"),), may_refuse=foreign)
        again = quantized(source, "nearest", "int8-channel", "compressed-tensors", "--requantize")
        yield Case(f"requantize {source}", (again,), may_refuse=foreign)
        yield Case(f"inspect {source}", (("inspect", source, "--json"),))
        if not foreign:
            yield Case(f"logits {source}", (("logits", source),))
            beside = source.startswith(("sources/ct", "sources/fp8"))
            yield Case(f"kv {source}", (("kv", source, "-o", "out/model", *FEW, "--json"),), may_refuse=not beside)
    for source, to, grid in (
        ("sources/ct-int4-g32", "awq", "int4-g128-asym"),
        ("sources/ct-fp8", "gptq", "int4-g64"),
        ("sources/q4_k_m.gguf", "compressed-tensors", "int4-g128"),
        ("sources/bnb-nf4", "gguf", "Q4_K_M"),
        ("sources/ct-nvfp4", "gguf", "Q4_0"),
        ("sources/fp8-block", "bitsandbytes", "nf4-g64"),
        ("goldens/gptq-desc-act", "compressed-tensors", "int4-g32"),
    ):
        words = ("convert", source, "-o", output(to), "--to", to, "--grid", grid, *NO_ENGINE)
        yield Case(f"convert {source} {to} {grid}", (words,))
    for source in ("sources/ct-int4-g32", "sources/q4_k_m.gguf", "sources/bf16.gguf", "sources/fp8-block"):
        again = quantized(source, "gptq", "int3-g32", "compressed-tensors", "--requantize", *FEW)
        yield Case(f"requantize {source} gptq", (again,))
    yield Case("dequantize adapter", (("dequantize", "small", "-o", "out/model", "--adapter", "adapter"),))
    float32 = ("dequantize", "sources/ct-int4-g32", "-o", "out/model", "--dtype", "float32")
    yield Case("dequantize float32", (float32,))


def measured() -> Iterator[Case]:
    """Numbers, compared digit by digit."""
    per_head = ("kv", "small", "-o", "out/model", "--kv", "fp8-e4m3-head", "--observer", "mse", *FEW, "--json")
    yield Case("kv small", (per_head,))
    yield Case("kv demo", (("kv", "demo", "-o", "out/model", *DEMO_FEW, "--json"),))
    yield Case("imatrix-file demo", (("imatrix", "demo", "-o", "out/imatrix.gguf", *DEMO_FEW),))
    for model in ("small", "families/mixtral", "families/gpt_oss", "families/gpt2"):
        yield Case(f"imatrix-file {model}", (("imatrix", model, "-o", "out/imatrix.gguf", *FEW),))
    window = ("--text", "text.txt", "--length", "32", "--windows", "3", "--json")
    small = ("--against", "small", *window)
    int4 = quantized("small", "nearest", "int4-g32", "compressed-tensors")
    w8a8 = quantized("small", "nearest", "w8a8", "compressed-tensors", out="out/w8a8")
    q4_k_m = quantized("small", "nearest", "Q4_K_M", "gguf")
    yield Case("eval folder", (int4, w8a8, ("eval", "out/model", "out/w8a8", *small)))
    yield Case("eval gguf", (q4_k_m, ("eval", "out/model.gguf", *small)))
    kinds = ("none", "fp8-e4m3", "fp8-e4m3-head", "int8", "int4", "q8_0", "q4_0")
    caches = [word for kind in kinds for word in ("--kv", kind)]
    yield Case("eval caches", (int4, ("eval", "out/model", *caches, *small)))
    for convention in ("papers", "llama.cpp"):
        yield Case(f"eval {convention}", (int4, ("eval", "out/model", "--convention", convention, *small)))
    for family in ("mixtral", "gpt2", "gemma3", "qwen3_5_moe"):
        made = quantized(f"families/{family}", "nearest", "int4-g32", "compressed-tensors")
        yield Case(f"eval {family}", (made, ("eval", "out/model", "--against", f"families/{family}", *window)))
    made = quantized("demo", "nearest", "int3-g64", "compressed-tensors")
    evaluated = ("eval", "out/model", "--against", "demo", "--length", "64", "--windows", "4", "--json")
    places = ("--lengths", "128", "--depths", "2", "--facts", "2", "--kv", "stored", "--kv", "q4_0")
    yield Case("eval demo", (made, evaluated))
    yield Case("needle demo", (made, ("needle", "out/model", "--against", "demo", *places, "--json")))


def killed() -> Iterator[Case]:
    """A run that is ended in the middle and goes on is one that was never ended."""
    for method, grid, to in (
        ("nearest", "int4-g32", "compressed-tensors"),
        ("awq+gptq", "int4-g128", "compressed-tensors"),
        ("gptq", "Q4_K_M", "gguf"),
    ):
        whole = quantized("demo", method, grid, to, *DEMO_FEW, out="out/whole/model")
        again = quantized("demo", method, grid, to, *DEMO_FEW, out="out/again/model")
        yield Case(f"killed {method} {grid} {to}", (whole, ("killed", *again), ("same", "out/whole", "out/again")))


def every() -> list[Case]:
    return [*uncalibrated(), *calibrated(), *options(), *families(), *moves(), *measured(), *killed()]


def quick(cases: list[Case]) -> list[Case]:
    """Some of each kind."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return [case for found in kinds.values() for case in found[::QUICK]]


QUICK = 13
"""One of so many is quick's."""
