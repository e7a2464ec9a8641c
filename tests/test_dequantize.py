"""A quantized model as the source: decoded into 16 bits, or quantized again."""

import json

import gguf
import pytest
import torch
import transformers
from llama_cpp import Llama, llama_cpp
from tests import tiny

import halfbyte
from halfbyte.errors import BadRequest
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.gguf import file

SOURCES = {
    "compressed-tensors": {"grid": "int4-g32"},
    "gptq": {"grid": "int4-g32-asym", "to": "gptq"},
    "awq": {"grid": "int4-g32", "to": "awq"},
    "bitsandbytes": {"grid": "nf4"},
    "fp8": {"grid": "fp8-e4m3-tensor", "to": "fp8"},
    "gguf": {"grid": "Q4_0"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and what each container makes of it."""
    home = tmp_path_factory.mktemp("home")
    tiny.make(home / "model", chat=True)
    for name, words in SOURCES.items():
        halfbyte.quantize(home / "model", home / name_of(name), method="nearest", **words)
    return home


def name_of(container: str) -> str:
    return "gguf.gguf" if container == "gguf" else container


def decoded(path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name).float() for name in checkpoint.tensors()}


@pytest.mark.parametrize("container", SOURCES)
def test_sixteen_bits_of_every_container_load_in_transformers(home, tmp_path, container):
    report = halfbyte.dequantize(home / name_of(container), tmp_path / "out")
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, value in decoded(home / name_of(container)).items():
        assert torch.equal(state[name], value.bfloat16().float()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "<user>fox"
    assert any("does not come back" in warning for warning in report["warnings"])


@pytest.mark.parametrize("container", ["awq", "gguf"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gguf_of_sixteen_bits(home, tmp_path, container, dtype):
    halfbyte.dequantize(home / name_of(container), tmp_path / "out.gguf", dtype=dtype)
    kind = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {t.tensor_type for t in stored.values() if len(t.shape) > 1} == {kind}
    wanted = decoded(home / name_of(container))
    for name, value in decoded(tmp_path / "out.gguf").items():
        narrow = value if value.dim() == 1 else wanted[name].to(getattr(torch, dtype)).float()
        assert torch.equal(value, narrow), name
    assert file.read(tmp_path / "out.gguf").get("general.file_type") == {"float16": 1, "bfloat16": 32}[dtype]


@pytest.mark.parametrize(
    ("name", "dtype"), [("M-F16.gguf", "F16"), ("m.bf16.gguf", "BF16"), ("f32.gguf", "F32"), ("stuff16.gguf", "BF16")]
)
def test_a_gguf_holds_what_its_name_says(home, tmp_path, name, dtype):
    halfbyte.dequantize(home / "awq", tmp_path / name)
    stored = gguf.GGUFReader(tmp_path / name).tensors
    assert {t.tensor_type.name for t in stored if len(t.shape) > 1} == {dtype}


@pytest.mark.parametrize(("name", "dtype"), [("M-F16.gguf", "bfloat16"), ("M-Q4_K_M.gguf", None)])
def test_a_name_that_says_otherwise_is_refused(home, tmp_path, name, dtype):
    with pytest.raises(BadRequest, match=rf"{name} is called \w+, and would be BF16; call it so, or give the --dtype"):
        halfbyte.dequantize(home / "awq", tmp_path / name, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_quantize_takes_the_grid_from_a_ggufs_name(home, tmp_path):
    said = tiny.halfbyte("quantize", home / "model", "-o", tmp_path / "m-Q5_0.gguf", "--method", "nearest")
    assert said.code == 0, said.err
    assert file.read(tmp_path / "m-Q5_0.gguf").get("general.file_type") == 8
    assert "is the default" not in said.out
    other = halfbyte.quantize(home / "model", tmp_path / "m-Q8_0.gguf", method="nearest", grid="Q5_0")
    assert "m-Q8_0.gguf is called Q8_0, and most of it is Q5_0" in other.warnings


def test_what_quantizing_again_gains_is_said_before_it_is_done(home, tmp_path):
    words = ("quantize", home / "gguf.gguf", "--method", "nearest", "--requantize")
    said = tiny.halfbyte(*words, "-o", tmp_path / "larger", "--grid", "int8-channel").out
    note, done = (said.index(words) for words in ("bits per weight become 8.", "read back and verified"))
    assert note < done
    assert said.count("bits per weight become") == 1
    assert "so that it becomes no smaller and no more exact" in said
    said = tiny.halfbyte(*words, "-o", tmp_path / "smaller", "--grid", "int3-g64").out
    assert "4.50 bits per weight become 3.2" in said
    assert "no smaller" not in said


def test_llama_cpp_loads_it(home, tmp_path, monkeypatch):
    halfbyte.dequantize(home / "awq", tmp_path / "out.gguf", dtype="float16")
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    monkeypatch.setattr(llama_cpp, "llama_model_default_params", lambda: params)
    ids = list(range(20))
    model = Llama(str(tmp_path / "out.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(ids)
    ours = halfbyte.load(home / "awq", torch.float32)(torch.tensor([ids])).logits[0]
    theirs = torch.tensor(model.scores[: len(ids)])
    assert (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().median() < 0.02


@pytest.mark.parametrize("container", ["bitsandbytes", "gguf"])
def test_quantizing_again_is_quantizing_the_decoded_values(home, tmp_path, container):
    words = {"method": "nearest", "grid": "int4-g64"}
    halfbyte.dequantize(home / name_of(container), tmp_path / "plain", dtype="float32")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    dtype = str(Checkpoint.open(home / name_of(container)).dtype).removeprefix("torch.")  # of scales
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    halfbyte.quantize(tmp_path / "plain", tmp_path / "b", **words)
    report = halfbyte.quantize(home / name_of(container), tmp_path / "a", requantize=True, **words)
    a, b = (Checkpoint.open(tmp_path / name) for name in "ab")
    assert a.quantized.keys() == b.quantized.keys()
    assert all(torch.equal(a.read_quantized(m).decode(), b.read_quantized(m).decode()) for m in a.quantized)
    assert any("taken as the original" in warning for warning in report["warnings"])
    assert "taken as the original" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_a_decoded_tensor_is_kept_in_the_precision_planned(home, tmp_path, method):
    """Embedding, head and what is skipped are quantized in the source, and decoded in float32."""
    words = {"grid": "int4-g64", "skip": "layers.0.*", "calibration": {"samples": 2, "length": 32}}
    halfbyte.quantize(home / name_of("gguf"), tmp_path / "out", requantize=True, method=method, **words)
    source, written = Checkpoint.open(home / name_of("gguf")), Checkpoint.open(tmp_path / "out")
    decoded = [tensor for tensor in written.entries if tensor in source.tensors()]
    assert any("layers.0" in tensor and len(written.spec(tensor).shape) == 2 for tensor in decoded)
    for tensor in decoded:
        assert written.read(tensor).dtype == source.spec(tensor).dtype
        assert torch.equal(written.read(tensor), source.read(tensor).to(source.spec(tensor).dtype))


def test_what_is_not_quantized_is_said_to_be_so(home, tmp_path):
    result = tiny.halfbyte("dequantize", home / "model", "-o", tmp_path / "out")
    tiny.refused(result, "is not quantized", "--adapter")
    tiny.refused(
        tiny.halfbyte("dequantize", home / "awq", "-o", tmp_path / "out", "--dtype", "int8"),
        "unknown dtype",
        "bfloat16",
    )
    tiny.refused(
        tiny.halfbyte("dequantize", home / "awq", "-o", tmp_path / "out", "--to", "awq"), "safetensors or gguf"
    )


@pytest.mark.parametrize(
    "command", [["dequantize"], ["convert", "--to", "compressed-tensors"]], ids=lambda command: command[0]
)
def test_the_recipe_that_is_written_makes_it_again(home, tmp_path, command):
    made = tiny.halfbyte(*command, home / "gptq", "-o", tmp_path / "a")
    assert made.code == 0, made.err
    result = tiny.halfbyte("quantize", "--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b")
    assert result.code == 0, result.err
    assert tiny.weights(tmp_path / "a") == tiny.weights(tmp_path / "b")
