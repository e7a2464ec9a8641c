"""`halfbyte convert` into GGUF and out of it: exact where the grids coincide, rounded with the error stated where they
do not."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from llamacpp import logits

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.gguf import file as gguf_file
from models.families import Family

EXACT = {
    "int4-g128": "gptq",
    "int4-g64": "compressed-tensors",
    "int4-g32": "gptq",
    "int4-channel": "compressed-tensors",
    "int8-g128": "gptq",
}
ROUNDED = {"int4-g128-asym": ("awq", "Q4_1", 2e-3), "int8-g128-asym": ("compressed-tensors", "Q8_0", 6e-3)}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("transcode")


def folder(home: Path, grid: str, to: str) -> Path:
    if not (home / grid).exists():
        halfbyte.quantize(demo.MODEL, home / grid, method="nearest", grid=grid, to=to)
    return home / grid


def convert(source: Path, out: Path, *words: object) -> dict:
    result = tiny.halfbyte("convert", source, "-o", out, "--json", *words)
    assert result.code == 0, result.err
    return json.loads(result.out)


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Every matrix in blocks, by its name on the hub."""
    checkpoint = Checkpoint.open(path)
    return {m: checkpoint.read_quantized(m).decode().float() for m in checkpoint.quantized if ".layers." in m}


def types(path: Path) -> set[str]:
    return {
        stored.type
        for name, stored in gguf_file.read(path).tensors.items()
        if name.startswith("blk.") and "norm" not in name
    }


@pytest.mark.parametrize("grid", EXACT)
def test_symmetric_integers_are_the_same_values(grid, home):
    source = folder(home, grid, EXACT[grid])
    out = home / f"{grid}.gguf"
    report = convert(source, out, "--to", "gguf")
    assert max(row["error"] for row in report["weights"]) == 0
    assert types(out) == {"Q8_0" if "int8" in grid else "Q4_0"}
    was, now = decoded(source), decoded(out)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[m], now[m]) for m in was)


def test_the_gguf_package_reads_the_same_values(home):
    """By a reader that is not ours, but for the order of rows of q and k."""
    out = home / "read.gguf"
    convert(folder(home, "int4-g128", "gptq"), out, "--to", "gguf")
    ours = decoded(out)
    read = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(out).tensors}
    for name, theirs in read.items():
        if name.startswith("blk.") and "norm" not in name and not name.endswith(("attn_q.weight", "attn_k.weight")):
            number, kind = name.split(".")[1:3]
            parts = {
                "attn_v": "self_attn.v_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_gate": "mlp.gate_proj",
                "ffn_up": "mlp.up_proj",
            }
            assert torch.equal(theirs, ours[f"model.layers.{number}.{parts.get(kind, 'mlp.down_proj')}"])


def test_llama_cpp_computes_what_the_folder_computes(home):
    source, out = folder(home, "int4-g64", "compressed-tensors"), home / "same.gguf"
    convert(source, out, "--to", "gguf")
    some = list(range(100, 200))
    with torch.no_grad():
        was = halfbyte.load(source, torch.float32)(torch.tensor([some])).logits[0].double().log_softmax(-1)
    now = logits(out, some).double().log_softmax(-1)
    assert float((was.exp() * (was - now)).sum(-1).mean()) < 1e-3


@pytest.mark.parametrize("grid", ROUNDED)
def test_zero_points_are_rounded_and_the_error_is_said(grid, home):
    to, type_name, most = ROUNDED[grid]
    source, out = folder(home, grid, to), home / f"{grid}.gguf"
    report = convert(source, out, "--to", "gguf")
    assert types(out) == {type_name}
    assert 0 < max(row["error"] for row in report["weights"]) < most
    assert any("rounded again" in warning for warning in report["warnings"])
    was, now = decoded(source), decoded(out)
    assert all((was[m] - now[m]).norm() < most * was[m].norm() for m in was)


@pytest.mark.slow
def test_a_named_preset_or_type_is_what_is_rounded_to(home):
    source = folder(home, "int4-g128-asym", "awq")
    convert(source, home / "named.gguf", "--to", "gguf", "--grid", "q5_1")
    assert types(home / "named.gguf") == {"Q5_1"}
    convert(source, home / "preset.gguf", "--to", "gguf", "--grid", "Q4_K_M")
    assert types(home / "preset.gguf") == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_a_q4_0_goes_back_value_for_value(to, home):
    source, there, back = folder(home, "int4-g32", "gptq"), home / f"{to}.gguf", home / f"back-{to}"
    convert(source, there, "--to", "gguf")
    report = convert(there, back, "--to", to)
    assert max(row["error"] for row in report["weights"]) == 0
    was, now = decoded(source), decoded(back)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[m], now[m]) for m in was)
    transformers_reads(back)


def transformers_reads(path: Path) -> None:
    """Config and tokenizer are whole, though the GGUF holds neither as a file."""
    some = "The quick brown fox, and 1234 of them."
    assert (
        Checkpoint.open(path).tokenizer()(some)["input_ids"]
        == Checkpoint.open(demo.MODEL).tokenizer()(some)["input_ids"]
    )
    said, meant = json.loads((path / "config.json").read_text()), json.loads((demo.MODEL / "config.json").read_text())
    for name in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
    ):
        assert said[name] == meant[name]


@pytest.fixture(scope="module")
def mixed(home) -> Path:
    halfbyte.quantize(demo.MODEL, home / "mixed.gguf", method="nearest", grid="Q4_K_M")
    return home / "mixed.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_k_quants_are_rounded_to_the_grid_that_is_named(to, mixed, home):
    report = convert(mixed, home / f"k-{to}", "--to", to, "--grid", "int4-g128")
    errors = [row["error"] for row in report["weights"]]
    assert 0.03 < max(errors) < 0.15
    assert all("rounded again" in row["note"] for row in report["weights"])
    assert "in 16 bits" in report["kept"]["model.embed_tokens.weight"]
    was, now = decoded(mixed), decoded(home / f"k-{to}")
    assert was.keys() == now.keys()
    result = tiny.halfbyte("eval", home / f"k-{to}", "--against", mixed, "--windows", "1", "--json")
    assert json.loads(result.out)["models"][0]["kl"] < 0.05


def test_without_a_grid_it_is_said_what_is_missing(mixed, home):
    with pytest.raises(Unsupported, match="--grid int4-g"):
        halfbyte.convert(mixed, home / "nothing", "awq")
    assert not (home / "nothing").exists()


def test_a_head_goes_back_to_sixteen_bits(home, tmp_path):
    tiny.make(tmp_path / "model", hidden_size=256, intermediate_size=256)
    halfbyte.quantize(tmp_path / "model", tmp_path / "model.gguf", method="nearest")
    assert gguf_file.read(tmp_path / "model.gguf").tensors["output.weight"].type == "Q6_K"
    report = convert(tmp_path / "model.gguf", tmp_path / "out", "--to", "gptq", "--grid", "int4-g64")
    assert "16 bits" in report["kept"]["lm_head.weight"]
    was, now = (
        Checkpoint.open(tmp_path / "model.gguf").read("lm_head.weight"),
        Checkpoint.open(tmp_path / "out").read("lm_head.weight"),
    )
    assert torch.equal(was.to(now.dtype), now)


def test_parts_become_one_file_and_back(mixed, home):
    halfbyte.quantize(demo.MODEL, home / "parts", method="nearest", grid="Q4_K_M", shard_gb=0.001)
    convert(home / "parts", home / "joined.gguf", "--to", "gguf")
    joined, whole = gguf_file.read(home / "joined.gguf"), gguf_file.read(mixed)
    assert {n: (s.type, s.shape) for n, s in joined.tensors.items()} == {
        n: (s.type, s.shape) for n, s in whole.tensors.items()
    }
    assert all(torch.equal(s.entry.read(), whole.tensors[n].entry.read()) for n, s in joined.tensors.items())
    assert {k: v for k, v in joined.metadata.items() if k != "general.name"} == {
        k: v for k, v in whole.metadata.items() if k != "general.name"
    }


def test_experts_of_a_stack_come_apart_and_together(tmp_path):
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "norm_topk_prob": True,
    }
    model = Family("qwen3_moe", {}, moe, torch.bfloat16).save(tmp_path / "model")
    halfbyte.quantize(model, tmp_path / "folder", method="nearest", grid="int4-g32", to="compressed-tensors")
    convert(tmp_path / "folder", tmp_path / "model.gguf", "--to", "gguf")
    found = gguf_file.read(tmp_path / "model.gguf").tensors
    assert (found["blk.1.ffn_gate_exps.weight"].type, found["blk.1.ffn_gate_exps.weight"].shape) == (
        "Q4_0",
        (4, 64, 64),
    )
    convert(tmp_path / "model.gguf", tmp_path / "back", "--to", "compressed-tensors")
    was, now = decoded(tmp_path / "folder"), decoded(tmp_path / "back")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[m], now[m]) for m in was)


@pytest.mark.parametrize(("grid", "kind"), [("Q4_K_M", 15), ("Q5_K_S", 16), ("q8_0", 7)])
def test_a_type_that_is_asked_for_is_written_and_named_by_what_is_written(grid, kind, home, tmp_path):
    """Q4_0 would hold the values as they are, and is not what was asked for; the recipe makes the same file again."""
    out = tmp_path / "out.gguf"
    report = convert(folder(home, "int4-g128", "gptq"), out, "--to", "gguf", "--grid", grid)
    found = types(out)
    assert found == {"q8_0": {"Q8_0"}, "Q4_K_M": {"Q4_K", "Q6_K"}, "Q5_K_S": {"Q5_K"}}[grid]
    assert gguf_file.read(out).metadata["general.file_type"].value == kind
    assert report["output"]["grid"] == grid.upper()
    assert f"gguf, {grid.upper()}]" in (tmp_path / "out.README.md").read_text().replace(",  ", ", ")
    assert all("rounded again, as asked" in row["note"] for row in report["weights"] if grid != "q8_0")
    assert tiny.halfbyte("quantize", "--recipe", tmp_path / "out.recipe.yaml", "-o", tmp_path / "again.gguf").code == 0
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def test_without_a_type_the_label_is_what_is_written(home, tmp_path):
    report = convert(folder(home, "int4-g128", "gptq"), tmp_path / "out.gguf", "--to", "gguf")
    assert report["output"]["grid"] == "Q4_0"
    assert gguf_file.read(tmp_path / "out.gguf").metadata["general.file_type"].value == 2


def test_a_preset_that_most_matrices_do_not_fit_is_not_the_label(tmp_path):
    """Gemma 3 has more norms, which are in F32, than matrices."""
    model = Family(
        "gemma3_text", {}, {"hidden_size": 192, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    ).save(tmp_path / "model")
    report = halfbyte.quantize(model, tmp_path / "out.gguf", grid="Q4_K_M", method="nearest")
    assert report["output"]["grid"] == "Q5_0"
    assert gguf_file.read(tmp_path / "out.gguf").metadata["general.file_type"].value == 8
    assert any("most of this is Q5_0, not Q4_K_M" in warning for warning in report["warnings"])
