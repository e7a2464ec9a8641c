"""For each claim of Transformers: the command that is printed loads what was written, and computes what the decoded
weights compute."""

import re
from functools import partial

import pytest
import torch
from transformers.models.auto import modeling_auto as auto

import halfbyte
import tiny
from halfbyte.engines.architectures import architecture_of, registry
from halfbyte.engines.engines import LOADED
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.experts import unstacked
from halfbyte.packed import QuantLinear
from halfbyte.report.card import code
from halfbyte.targets.gguf.blocks import TYPE_OF
from models.every import ENCODERS, EVERY
from models.families import FAMILIES, Family
from models.test_architectures import with_decoded
from reach import require_product
from targets.gguf.variants import CASES

TOKENS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(1))
CLAIMED = registry("transformers")
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def outputs(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    words = (
        {"decoder_input_ids": TOKENS} if getattr(model.config, "is_encoder_decoder", False) else {"use_cache": False}
    )
    with torch.no_grad():
        out = model.eval()(input_ids=TOKENS, **words)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def verdict(report):
    return next(e for e in report["engines"] if e["engine"] == "transformers")


def run(report, path, dtype=None):
    """What the card's lines of Python make, on this processor, and of another dtype than they say if one is named."""
    lines = code(verdict(report), path, "ORIGINAL").partition("\ntokenizer")[0]
    found = {}
    if dtype:
        said = f'device_map="auto", dtype="{str(dtype).removeprefix("torch.")}"'
        lines = re.sub(', dtype="[^"]*"', "", lines).replace('device_map="auto"', said)
    exec(lines.replace('device_map="auto"', 'device_map="cpu"'), found)
    return found["model"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Family("llama", {}, WIDE, torch.bfloat16).save(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def in_32_bits(tmp_path_factory):
    return Family("llama", {}, WIDE).save(tmp_path_factory.mktemp("llama32") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt"))


WEIGHTS = [
    *(
        "int2-g32",
        "int3-g64",
        "int4-g32",
        "int4-g128",
        "int4-channel",
        "int4-tensor",
        "int5-g32",
        "int6-channel",
        "int7-g64",
        "int8-g128",
        "int8-channel",
    ),
    *(
        "int2-g64-asym",
        "int3-channel-asym",
        "int4-g32-asym",
        "int4-g128-asym",
        "int4-channel-asym",
        "int8-g32-asym",
        "int8-channel-asym",
    ),
    *("fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8-e4m3", "mxfp6-e2m3", "mxfp4", "nvfp4"),
]
INPUTS = [
    *(
        "int8-channel/int8-token",
        "int4-g32/int8-token",
        "int8-channel/int8-token-asym",
        "int4-g32-asym/int8-token-asym",
    ),
    *("int8-channel/int8-static", "int8-channel/int8-static-asym", "int8-channel-asym/int8-static-asym"),
    *("int8-tensor/int8-tensor", "int4-channel/int4-token", "fp8", "fp8-static", "fp8-block", "w4a8-fp8"),
    *("w4a4-nvfp4", "mxfp4/mxfp4", "mxfp8-e4m3/mxfp8-e4m3"),
]
IN_BFLOAT16 = [scheme for scheme in (*WEIGHTS, *INPUTS) if re.match("mx|nvfp4|w4a4", scheme)]


def written(source, out, scheme, text):
    calibration = {"source": text, "samples": 2, "length": 64}
    report = halfbyte.quantize(
        source,
        out,
        method="minmax",
        grid=scheme,
        to="compressed-tensors",
        calibration=calibration,
        engine="transformers",
    )
    assert verdict(report)["word"] == "tested here"
    return report


@pytest.mark.slow
@pytest.mark.parametrize("scheme", WEIGHTS)
def test_every_kind_of_weights_loads(llama, text, tmp_path, scheme):
    report = written(llama, tmp_path / "out", scheme, text)
    assert torch.equal(outputs(run(report, tmp_path / "out")), outputs(halfbyte.load(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", INPUTS)
def test_every_kind_of_rounded_inputs_is_multiplied_as_we_multiply(in_32_bits, text, tmp_path, scheme):
    """Linear by linear, on what theirs reads: both are products of the same inputs on their grid, up to rounding."""
    report = written(in_32_bits, tmp_path / "out", scheme, text)
    theirs, ours = run(report, tmp_path / "out"), halfbyte.load(tmp_path / "out", torch.float32)
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
    seen = {}

    def note(module, read, made, name):
        seen[name] = read[0], made

    for name in linears:
        theirs.get_submodule(name).register_forward_hook(partial(note, name=name))
    outputs(theirs)
    assert len(seen) == len(linears) == 14
    for name, linear in linears.items():
        (x, made), stored = seen[name], {n: getattr(linear, f"input_{n}") for n in linear.stored}
        # Theirs of symmetric integers that are found as it runs span half a step more than engines' and ours: 127.5.
        found = re.fullmatch(r"int\d-(token|tensor)", str(linear.activations))
        spanned = linear.activations.top / (linear.activations.top + 0.5) if found else 1
        require_product(made, linear.weight.to(theirs.dtype), x, linear.activations, stored, spanned)
        require_product(linear(x.float()), linear.weight, x.float(), linear.activations, stored)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", IN_BFLOAT16)
def test_what_is_decoded_in_bfloat16_is_loaded_so_whatever_the_dtype_of_the_model(in_32_bits, text, tmp_path, scheme):
    """Else the printed command would load it in float32, and its first product would fail."""
    model = run(written(in_32_bits, tmp_path / "out", scheme, text), tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert outputs(model).isfinite().all()


EXPERT_WORDS = [
    *({"grid": grid} for grid in ("int4-g32", "int8-channel", "int3-g32", "fp8-e4m3-channel", "fp8-e4m3-tensor")),
    *({"grid": "int4-g32", "override": {pattern: "int8-g32"}} for pattern in ("*.experts.*", "*.self_attn.*")),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", EXPERT_WORDS)
def test_numbered_experts_load(tmp_path, words):
    FAMILIES["qwen3_moe"].save(tmp_path / "model")
    report = halfbyte.quantize(
        tmp_path / "model", tmp_path / "out", method="nearest", to="compressed-tensors", engine="transformers", **words
    )
    assert torch.equal(outputs(run(report, tmp_path / "out")), outputs(halfbyte.load(tmp_path / "out")))


FOUND = {
    name: (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type], family.save) for name, family in FAMILIES.items()
}
"""Name to architecture, and to what saves a small one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, (architecture, _) in FOUND.items() if CLAIMED.knows({"architectures": [architecture]})]
)
def test_every_model_loads_by_the_printed_command(name, tmp_path):
    architecture, save = FOUND[name]
    source = save(tmp_path / "model")
    words = {"method": "nearest", "grid": "int4-g32", "to": "compressed-tensors", "engine": "transformers"}
    try:
        report = halfbyte.quantize(source, tmp_path / "out", **words)
    except Unsupported as refused:  # experts in one tensor: they load in 16 bits, as the refusal says
        report = halfbyte.quantize(source, tmp_path / "out", **words, skip=re.findall("--skip '(.*?)'", str(refused)))
    model = run(report, tmp_path / "out")
    assert type(model).__name__ == architecture_of(Checkpoint.open(source).config) == architecture

    theirs, dimensions = watched(model, tmp_path / "out")
    assert dimensions <= {3} or architecture in CLAIMED.reshaped

    expected = type(model).from_pretrained(
        with_decoded(unstacked(Checkpoint.open(source)), Checkpoint.open(tmp_path / "out"), tmp_path / "decoded"),
        dtype="auto",
    )
    assert theirs.std() > 0.01
    assert difference(theirs, outputs(expected)) < 1e-5


def watched(model, folder):
    """What a model returns, and how many dimensions that which its quantized linears read has."""
    dimensions = set()
    modules = {name.rpartition(".")[2] for name in Checkpoint.open(folder).quantized}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in modules:
            module.register_forward_pre_hook(lambda _, read: dimensions.add(read[0].dim()) if read else None)
    return outputs(model), dimensions


CLASSES = {
    "AutoModel": auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
TINY = {name: (CLASSES[family.by][family.kind], family) for name, family in {**EVERY, "t5": ENCODERS["t5"]}.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, (architecture, _) in TINY.items() if CLAIMED.knows({"architectures": [architecture]})]
)
def test_every_family_loads_by_the_printed_command(name, tmp_path):
    architecture, family = TINY[name]
    source, words = (
        family.save(tmp_path / "model"),
        {"method": "nearest", "grid": "int4-g16", "to": "compressed-tensors", "engine": "transformers"},
    )
    try:
        report = halfbyte.quantize(source, tmp_path / "out", **words)
    except Unsupported as refused:  # experts in one tensor, as above
        report = halfbyte.quantize(source, tmp_path / "out", **words, skip=re.findall("--skip '(.*?)'", str(refused)))
    assert verdict(report)["word"] == "tested here"
    model = run(report, tmp_path / "out", torch.float32)
    assert type(model).__name__ == architecture_of(Checkpoint.open(source).config) == architecture
    theirs, dimensions = watched(model, tmp_path / "out")
    assert dimensions <= {3} or architecture in CLAIMED.reshaped
    assert theirs.std() > 0.01
    assert difference(theirs, outputs(halfbyte.load(tmp_path / "out", torch.float32))) < 1e-5


def test_what_is_said_to_be_tested_is_what_is_loaded_here():
    loaded = {
        architecture
        for architecture, _ in (*TINY.values(), *FOUND.values())
        if CLAIMED.knows({"architectures": [architecture]})
    }
    assert all(re.fullmatch(LOADED, architecture) for architecture in loaded)
    assert {name for name in CLAIMED.names | CLAIMED.dequantized if re.fullmatch(LOADED, name)} <= loaded
    derived = {base.removesuffix("ForCausalLM") + ending for base in CLAIMED.names for ending in CLAIMED.derived}
    assert {name for name in derived if re.fullmatch(LOADED, name)} <= loaded


READ = {
    **CASES,
    "qwen3-heads": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma2-heads": (
        "gemma2",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16, "num_hidden_layers": 2},
    ),
    "gemma3-heads": (
        "gemma3_text",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16, "num_hidden_layers": 7},
    ),
    "qwen2-base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}
EQUAL = {
    "llama",
    "llama-tied",
    "llama-wide-heads",
    "mistral",
    "phi3",
    "qwen2",
    "qwen2-tied",
    "qwen2-base",
    "qwen3-heads",
    "gemma2-heads",
    "gemma3-heads",
}
"""What Transformers makes the same model of; of others it drops settings in silence, or fails."""


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_ggufs_that_it_is_said_to_read(name, tmp_path):
    kind, changes = READ[name]
    Family(kind, {}, changes, dtype=torch.bfloat16).save(tmp_path / "model")
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "a.gguf", grid="Q8_0", method="minmax")
    assert verdict(report)["loads"] == (name in EQUAL)
    if name in EQUAL:
        model = run(report, tmp_path / "a.gguf", torch.float32)
        assert torch.equal(outputs(model), outputs(halfbyte.load(tmp_path / "a.gguf", torch.float32)))


def test_every_model_whose_gguf_is_claimed_is_compared():
    assert {READ[name][0] for name in EQUAL} == registry("transformers-gguf").names


@pytest.mark.slow
@pytest.mark.parametrize("kind", [str(scheme) for scheme in TYPE_OF if not re.match("iq1", str(scheme))])
def test_transformers_decodes_every_type(llama, tmp_path, kind):
    report = halfbyte.quantize(llama, tmp_path / "a.gguf", grid=kind, pure=True, method="minmax")
    assert verdict(report)["word"] == "tested here"
    theirs, ours = run(report, tmp_path / "a.gguf", torch.float32), halfbyte.load(tmp_path / "a.gguf", torch.float32)
    assert torch.equal(outputs(theirs), outputs(ours))
