"""What Transformers and bitsandbytes save is what we write, and each reads the other's to the same numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte import demo
from halfbyte.containers.bitsandbytes import BitsAndBytes
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids import parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.run import with_activations
from halfbyte.solvers.nearest import nearest

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is the oracle: pip install -c constraints.txt bitsandbytes"
)
functional, modules = bitsandbytes.functional, bitsandbytes.nn

GRIDS = ["nf4-g64", "fp4-g64", "nf4-g64-double", "int8-channel"]
TOKENS = torch.arange(5, 69)[None]


def asked(grid):
    if grid == "int8-channel":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=grid[:3],
        bnb_4bit_use_double_quant="double" in grid,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def decoded(model) -> dict[str, torch.Tensor]:
    """The weights of every quantized module, as bitsandbytes decodes them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, modules.Linear4bit):
            found[name] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, modules.Linear8bitLt):
            found[name] = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


@pytest.fixture(scope="module", params=GRIDS)
def grid(request):
    return request.param


@pytest.fixture(scope="module")
def saved(grid, tmp_path_factory):
    """A folder that Transformers saved."""
    out = tmp_path_factory.mktemp("theirs") / grid
    AutoModelForCausalLM.from_pretrained(
        demo.MODEL, dtype=torch.bfloat16, quantization_config=asked(grid)
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def written(grid, tmp_path_factory):
    """A folder of ours, without a search, so by the rule of bitsandbytes."""
    out = tmp_path_factory.mktemp("ours") / grid
    halfbyte.quantize(demo.MODEL, out, method="minmax", grid=grid, to="bitsandbytes")
    return out


def test_the_files_of_both_hold_the_same_tensors(grid, saved, written):
    theirs, ours = load_file(saved / "model.safetensors"), load_file(written / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in ours.items() if "quant_state" not in n} == {
        n: (t.shape, t.dtype) for n, t in theirs.items() if "quant_state" not in n
    }
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(ours[name].numpy().tobytes()) == json.loads(tensor.numpy().tobytes())
        elif grid == "nf4-g64-double" and name.endswith(
            ("weight", "absmax")
        ):  # codes suit the scales as stored; see the tests of the grids
            assert (ours[name] == tensor).float().mean() > 0.95
        else:
            assert torch.equal(ours[name], tensor), name


def test_the_config_says_what_theirs_says(saved, written):
    theirs, ours = (
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (saved, written)
    )
    told = {key: value for key, value in theirs.items() if not key.startswith("_") and value is not None}
    assert told.items() <= {**ours, "bnb_4bit_compute_dtype": told["bnb_4bit_compute_dtype"]}.items()
    assert ours["llm_int8_skip_modules"] == ["lm_head"]


def test_a_folder_that_transformers_saved_reads_as_bitsandbytes_decodes_it(saved):
    checkpoint = Checkpoint.open(saved)
    theirs = decoded(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16))
    assert checkpoint.quantized.keys() == theirs.keys()
    assert len(theirs) == 42
    for module, w in theirs.items():
        assert torch.equal(checkpoint.read_quantized(module).decode().to(w.dtype), w)
    assert (
        checkpoint.spec("model.layers.0.mlp.up_proj.weight").shape
        == checkpoint.quantized["model.layers.0.mlp.up_proj"][1]
    )


@pytest.mark.parametrize("method", ["nearest", pytest.param("gptq", marks=pytest.mark.slow)])
def test_transformers_computes_what_our_decode_computes(grid, method, tmp_path):
    halfbyte.quantize(
        demo.MODEL,
        tmp_path / "out",
        method=method,
        grid=grid,
        to="bitsandbytes",
        calibration={"samples": 4, "length": 64},
    )
    checkpoint, model = (
        Checkpoint.open(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16),
    )
    for module, w in decoded(model).items():
        assert torch.equal(checkpoint.read_quantized(module).decode().to(w.dtype), w)
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        theirs, ours, plain = (
            m(TOKENS).logits.float().log_softmax(-1)
            for m in (model, halfbyte.load(tmp_path / "out"), halfbyte.load(demo.MODEL))
        )
    # Its kernels round scales (4 bits) and inputs (8 bits) to fewer bits than the file has.
    assert divergence(theirs, ours) < 0.2 * max(divergence(theirs, plain), 0.01)


def divergence(p, q) -> float:
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.slow
def test_gptq_lowers_the_divergence_of_nf4(tmp_path):
    def lost(method):
        words = {"grid": "nf4", "to": "bitsandbytes", "calibration": {"samples": 16, "length": 128}}
        halfbyte.quantize(demo.MODEL, tmp_path / method, method=method, **words)
        with torch.no_grad():
            return divergence(
                *(halfbyte.load(p)(TOKENS).logits.float().log_softmax(-1) for p in (demo.MODEL, tmp_path / method))
            )

    assert lost("gptq") < lost("nearest")


def test_bytes_in_another_storage_type_are_read(saved, grid, tmp_path):
    if grid == "int8-channel":
        pytest.skip("LLM.int8() has no storage type")
    tensors = load_file(saved / "model.safetensors")
    packed = {
        n: t.flatten().view(torch.bfloat16)[:, None] if f"{n}.absmax" in tensors else t for n, t in tensors.items()
    }
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    save_file({n: t.contiguous() for n, t in packed.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    module = "model.layers.0.mlp.up_proj"
    assert Checkpoint.open(tmp_path).read_quantized(module).equal(Checkpoint.open(saved).read_quantized(module))


def test_other_containers_take_its_weights_by_rounding_them_again(written, tmp_path):
    report = halfbyte.convert(written, tmp_path / "out", "compressed-tensors", grid="int8-g32")
    assert 0 < max(row["error"] for row in report["weights"]) < 0.01
    assert len(Checkpoint.open(tmp_path / "out").quantized) == 42


@pytest.mark.parametrize("name", ["nf4-g64", "fp4-g32-double", "nf4-g256-double", "llm-int8"])
@pytest.mark.parametrize("shape", [(64, 256), (160, 80), (271, 37)])
def test_what_is_packed_is_what_was_planned_and_comes_back(name, shape):
    container = BitsAndBytes()
    q = with_activations(
        nearest(torch.randn(shape, generator=torch.Generator().manual_seed(0)), parse(name)),
        container.resolve(parse(name), torch.bfloat16),
    )
    packed, plan = container.pack(q), container.plan(q.scheme, shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == {n: (s.shape, s.dtype) for n, s in plan.items()}
    assert container.unpack(packed, q.scheme, shape).equal(q)


def test_what_it_cannot_hold_is_refused_with_what_it_can(tmp_path):
    for name in ("int4-g128", "int8-g128", "int8-channel-asym", "q4_k"):
        with pytest.raises(Unsupported, match="nf4"):
            BitsAndBytes().check(BitsAndBytes().resolve(parse(name), torch.bfloat16), (64, 256))
    with pytest.raises(Unsupported, match="one scheme"):
        halfbyte.quantize(
            demo.MODEL,
            tmp_path / "out",
            method="nearest",
            grid="nf4",
            to="bitsandbytes",
            override={"*.0.mlp.*": "int8-channel"},
        )


def test_tables_of_others_and_orders_of_old_gpus_are_refused():
    container = BitsAndBytes()
    for name, tensor, reason in (
        ("nf4-g64-double", "weight.nested_quant_map", "nested_quant_map"),
        ("fp4-g64", "weight.quant_map", "quant_map"),
    ):
        q = nearest(torch.randn(64, 256), parse(name))
        packed = container.pack(q)
        with pytest.raises(Unsupported, match=reason):
            container.unpack({**packed, tensor: packed[tensor] * 0.5}, q.grid, q.shape)
    q = nearest(torch.randn(64, 256), parse("llm-int8"))
    with pytest.raises(Unsupported, match="weight_format"):
        container.unpack({**container.pack(q), "weight_format": torch.tensor(2, dtype=torch.uint8)}, q.grid, q.shape)


def test_a_state_that_is_no_json_is_a_broken_checkpoint(written, tmp_path, grid):
    if grid == "int8-channel":
        pytest.skip("LLM.int8() has no state")
    tensors = load_file(written / "model.safetensors")
    next(t for n, t in tensors.items() if "quant_state" in n).fill_(7)
    (tmp_path / "config.json").write_text((written / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="bitsandbytes"):
        _ = Checkpoint.open(tmp_path).quantized


@pytest.mark.slow
def test_a_model_of_fp16_is_decoded_to_fp16_wherever_its_weights_come_from(tmp_path):
    """Every matrix notes what it is decoded to, and Transformers goes by that."""
    half = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((demo.MODEL / name).read_bytes())
    halfbyte.quantize(tmp_path / "half", tmp_path / "made", method="minmax", grid="nf4-g64", to="bitsandbytes")
    halfbyte.convert(tmp_path / "made", tmp_path / "moved", "bitsandbytes")
    assert BitsAndBytes() == BitsAndBytes(torch.bfloat16), "what a run asks of a container changes no other"
    for name in ("made", "moved"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        states = [m.weight.quant_state for m in model.modules() if isinstance(m, modules.Linear4bit)]
        assert len(states) == 42
        assert {state.dtype for state in states} == {torch.float16}
