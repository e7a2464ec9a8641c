"""Rotations of hidden states: the rotated model computes what the original does, in what is written too, or the family
is refused by name. Transformers and llama.cpp are asked."""

import json
import re
from functools import cache

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import demo
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.transforms.orthogonal import hadamard, is_hadamard
from halfbyte.transforms.rotate import rotated
from models.families import FAMILIES, every, one_thread  # noqa: F401

TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
REFUSED = {
    "gemma2": "norms after attention",
    "gemma3": "norms after attention",
    "olmo2": "norms after attention",
    "glm4": "norms after attention",
    "bloom": "2 norms outside of its blocks",
}
"""Families whose hidden states meet something that no rotation passes through."""
KEEP_MEAN = {
    "phi", "gpt2", "gptj", "bigcode", "opt", "gpt_neox", "stablelm", "stablelm-parallel", "falcon", "falcon-new",
    "nemotron", "cohere",
}  # fmt: skip
"""Families of LayerNorm."""
WITHOUT_HEADS = ("mamba", "qwen3_5_moe")
"""Without attention; with a gate for each channel of a head."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of a family, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: FAMILIES[name].save(root / name))


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [2, 12, 20, 28, 36, 64, 72, 80, 96, 100, 320, 576, 640, 896])
def test_a_rotation_is_orthogonal_and_spreads(size, keeps_mean):
    rotation = hadamard(size, seed=0, keeps_mean=keeps_mean)
    matrix = rotation.apply(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    assert is_hadamard(size) == (size != 100)
    if keeps_mean:
        torch.testing.assert_close(matrix.sum(0), torch.ones(size), rtol=0, atol=1e-5)
    elif is_hadamard(size):
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))
    assert not torch.equal(hadamard(size, 1, keeps_mean).apply(torch.eye(size)), matrix) or size == 2


def logits(folder, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def plain_folder(checkpoint, folder):
    """What a rotated checkpoint reads as, in 32 bits, in a folder of its own."""
    folder.mkdir()
    save_file({name: checkpoint.read(name).contiguous() for name in checkpoint.tensors()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return folder


@pytest.mark.parametrize("family", every(n for n in FAMILIES if n not in REFUSED))
def test_transformers_computes_the_same_of_the_rotated_model(folders, tmp_path, family):
    checkpoint = Checkpoint.open(folders(family))
    turned = rotated(checkpoint)
    turned.rotation.prove()
    about = turned.rotation.describe()
    assert about["error"] < 1e-5
    assert (about["kind"] == "hadamard-mean") == (family in KEEP_MEAN)
    assert (about["heads"] > 0) == (family not in WITHOUT_HEADS)
    assert bool(about["untied_bytes"]) == checkpoint.tied
    expected = logits(checkpoint.path)
    difference = logits(plain_folder(turned, tmp_path / "rotated")) - expected
    assert difference.norm() < 1e-5 * expected.norm()
    embedding = next(t for t in checkpoint.tensors() if "embed" in t or "wte" in t)
    assert (turned.read(embedding) - checkpoint.read(embedding)).norm() > checkpoint.read(embedding).norm()


@pytest.mark.parametrize("family", every(REFUSED))
def test_what_no_rotation_passes_through_is_refused_by_name(folders, tmp_path, family):
    with pytest.raises(Unsupported, match=REFUSED[family]):
        halfbyte.quantize(folders(family), tmp_path / "out", method="rotate", grid="int8-channel")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3", *every(["gpt2", "mixtral", "gpt_oss"])])
def test_what_is_written_computes_what_the_original_does(folders, tmp_path, family):
    """Rounded to 8 bits, through a whole run; experts in stacks are read apart."""
    report = halfbyte.quantize(folders(family), tmp_path / "out", method="rotate", grid="int8-channel", engine="none")
    checkpoint = Checkpoint.open(folders(family))
    assert report.rotation.channels == 64
    assert report.source.size_bytes == sum(e.size_bytes for e in checkpoint.entries.values())
    assert bool(report.rotation.untied_bytes) == checkpoint.tied
    assert any("tensor of its own" in warning for warning in report.warnings) == checkpoint.tied
    rows = halfbyte.evaluate([tmp_path / "out"], folders(family), windows=2, length=32).models
    assert rows[0].kl < 0.01
    written = load_file(tmp_path / "out" / "model.safetensors")
    norms = [value for name, value in written.items() if re.search(r"(layernorm|ln_[12f]|\.norm)\.weight$", name)]
    assert len(norms) == 5
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)


def test_llama_cpp_computes_the_same_of_a_rotated_gguf(tmp_path):
    """A head that was the embedding is a tensor of its own there too."""
    from targets.gguf import llamacpp

    tokens = list(range(1, 60))
    found = {}
    for method in ("nearest", "rotate"):
        report = halfbyte.quantize(demo.MODEL, tmp_path / f"{method}.gguf", method=method, grid="F32")
        assert report.recipe.method == method
        found[method] = llamacpp.logits(tmp_path / f"{method}.gguf", tokens)
    difference = found["rotate"] - found["nearest"]
    assert difference.norm() < 4e-3 * found["nearest"].norm()  # tensors are rounded to the source's bfloat16


def test_the_same_rotation_again_and_another_under_another_solver(tmp_path):
    text = ["It was a dark night, and the wind blew from the sea. " * 40]
    words = {"grid": "int4-g64", "calibration": {"source": text, "samples": 2, "length": 64}}
    for name, method in (("a", "rotate+gptq"), ("b", "rotate+gptq")):
        halfbyte.quantize(demo.MODEL, tmp_path / name, method=method, **words)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_else_a_rotation_does_not_go_with_is_refused(folders, tmp_path):
    imatrix = tmp_path / "x.imatrix"
    with pytest.raises(BadRequest, match="importance matrix"):
        halfbyte.quantize(
            folders("llama"), tmp_path / "out", method="rotate", grid="Q4_K_M", to="gguf", imatrix=imatrix
        )
    plan = halfbyte.quantize(folders("qwen3"), tmp_path / "out", method="rotate", grid="int8-channel", dry_run=True)
    assert any("tensor of its own" in warning for warning in plan.warnings)
    assert not (tmp_path / "out").exists()
