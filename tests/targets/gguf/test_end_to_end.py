"""From a checkpoint to a GGUF on the command line: llama.cpp computes from it what we say that it holds, whatever
happens on the way."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llamacpp import llama_cpp, load, logits
from variants import CASES, distance, transformers_logits

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.containers.place import BESIDE, PICTURE
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import presets
from halfbyte.targets.gguf.blocks import LAYOUTS, READ_ONLY
from models.families import Family

EIGHT_BITS = 1e-3
"""Nats by which llama.cpp, which rounds activations to 8 bits, strays from exact activations; .00045 to .00075 on files
of its own making."""
WRITTEN = [name for name in BESIDE if name != PICTURE]
"""By a run; the picture is drawn when a model is measured."""
CALIBRATION = ["--samples", "2", "--length", "128"]
WIDE = {"hidden_size": 256, "intermediate_size": 512}
FAMILIES = {
    "qwen3": {**WIDE, "tie_word_embeddings": True},
    "gemma3": {**WIDE, "num_hidden_layers": 2},
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 256},
    "gpt2": {**WIDE, "n_embd": 256, "n_inner": 512},
}


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return calibrate.evaluation(Checkpoint.open(demo.MODEL), str(demo.HELDOUT), 160, 1).tokens[0].tolist()


@pytest.fixture(scope="module")
def original(tokens) -> torch.Tensor:
    return transformers_logits(demo.MODEL, tokens)


def ours(path: Path, tokens: list[int]) -> torch.Tensor:
    """Logits of Transformers' model with the weights that halfbyte reads from a file."""
    with torch.no_grad():
        return halfbyte.load(path, torch.float32)(torch.tensor([tokens])).logits[0]


def divergences(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats, [position]."""
    p, q = of.double().log_softmax(-1), to.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def divergence(of: torch.Tensor, to: torch.Tensor) -> float:
    return float(divergences(of, to).mean())


def quantize(*words: object) -> None:
    result = tiny.halfbyte("quantize", *words)
    assert result.code == 0, result.err


# What llama.cpp computes -------------------------------------------------------------------------------------------


def test_whole_files_say_what_the_model_says(tokens, original, tmp_path):
    for name, most in (("F32", 1e-4), ("BF16", 3e-3)):  # llama.cpp multiplies BF16 by activations of as few bits
        quantize(demo.MODEL, "-o", tmp_path / f"{name}.gguf", "--grid", name)
        assert distance(ours(tmp_path / f"{name}.gguf", tokens), original) < 1e-6
        assert distance(logits(tmp_path / f"{name}.gguf", tokens), original) < most


@pytest.mark.parametrize(
    "type_name",
    [
        name if name in ("Q8_0", "Q4_K", "IQ3_XXS") else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
        if name not in READ_ONLY
    ],
)
def test_a_file_of_any_type_says_what_we_say(type_name, tokens, tmp_path):
    path = tmp_path / "model.gguf"
    quantize(demo.MODEL, "-o", path, "--grid", type_name, "--pure", "--method", "nearest")
    assert {stored.type for stored in gguf_file.read(path).tensors.values()} == {type_name, "F32"}
    assert divergence(ours(path, tokens), logits(path, tokens)) < EIGHT_BITS
    model = load(path)
    assert (
        len(model.tokenize(model("The ", max_tokens=4, temperature=0)["choices"][0]["text"].encode(), add_bos=False))
        > 0
    )
    model.close()


@pytest.mark.parametrize(
    "preset", ["Q4_K_M", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("Q3_K_S", "Q4_0", "IQ4_XS"))]
)
def test_our_files_stand_beside_llama_quantizes(preset, tokens, original, tmp_path):
    """llama.cpp strays no further from ours than from its own, and no more is lost."""
    paths = {name: tmp_path / f"{name}.gguf" for name in ("whole", "ours", "theirs")}
    quantize(demo.MODEL, "-o", paths["whole"], "--grid", "BF16")
    quantize(demo.MODEL, "-o", paths["ours"], "--grid", preset, "--method", "nearest")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = presets.PRESETS[preset].number, 1
    assert (
        llama_cpp.llama_model_quantize(
            str(paths["whole"]).encode(), str(paths["theirs"]).encode(), ctypes.byref(params)
        )
        == 0
    )
    exact = {name: ours(paths[name], tokens) for name in ("ours", "theirs")}
    strays = {name: divergence(exact[name], logits(paths[name], tokens)) for name in exact}
    assert strays["ours"] < 1.25 * strays["theirs"] < EIGHT_BITS
    assert divergence(original, exact["ours"]) < 1.1 * divergence(original, exact["theirs"])


@pytest.mark.parametrize(
    "method", ["gptq", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("imatrix", "awq+gptq", "gptaq"))]
)
def test_every_method_ends_in_a_file_that_says_what_we_say(method, tokens, original, tmp_path):
    quantize(demo.MODEL, "-o", tmp_path / "model.gguf", "--method", method, *CALIBRATION)
    exact = ours(tmp_path / "model.gguf", tokens)
    assert divergence(exact, logits(tmp_path / "model.gguf", tokens)) < EIGHT_BITS
    assert divergence(original, exact) < 0.02


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    kind, changes = CASES[request.param]
    return Family(kind, {}, {**changes, **FAMILIES[request.param]}).save(tmp_path_factory.mktemp("family") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["Q4_K_M", "nearest"], ["q4_k", "awq+gptq"], ["IQ3_S", "imatrix"]], ids=" ".join)
def test_every_kind_of_family_says_what_we_say(words, family, tmp_path):
    """Rows in another order, norms of 1 + w, matrices that lie transposed, stacks of experts: with folds and
    without."""
    grid, method = words
    text = tiny.text(tmp_path / "text.txt")
    quantize(
        family,
        "-o",
        tmp_path / "model.gguf",
        "--grid",
        grid,
        "--method",
        method,
        "--calibration",
        text,
        "--samples",
        "4",
        "--length",
        "64",
    )
    some = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    exact = ours(tmp_path / "model.gguf", some)
    # The median, since 8 bits may send a token to another expert, where two are nearly as good.
    assert float(divergences(exact, logits(tmp_path / "model.gguf", some)).median()) < EIGHT_BITS
    assert float(divergences(transformers_logits(family, some), exact).median()) < 0.2


def test_parts_are_one_model(tokens, tmp_path):
    quantize(demo.MODEL, "-o", tmp_path / "whole.gguf", "--method", "nearest")
    quantize(demo.MODEL, "-o", tmp_path / "split", "--method", "nearest", "--shard-gb", "0.001", "--grid", "Q4_K_M")
    parts = sorted((tmp_path / "split").glob("*.gguf"))
    assert len(parts) > 2
    assert parts[0].name == f"split-00001-of-{len(parts):05d}.gguf"
    assert all(part.stat().st_size < 1.1e6 for part in parts if "00001" not in part.name)
    assert torch.equal(logits(parts[0], tokens), logits(tmp_path / "whole.gguf", tokens))


# What is written, and where it goes --------------------------------------------------------------------------------


def types(path: Path) -> dict[str, str]:
    return {name: stored.type for name, stored in gguf_file.read(path).tensors.items()}


def test_overrides_win_over_the_preset_and_skipped_matrices_keep_their_bits(tmp_path):
    words = ["--override", "layers.0.*=q8_0", "--override", "layers.2.mlp.*=keep", "--skip", "layers.1.*"]
    quantize(demo.MODEL, "-o", tmp_path / "model.gguf", "--method", "nearest", *words)
    found = types(tmp_path / "model.gguf")
    matrices = {name: kind for name, kind in found.items() if "norm" not in name}
    assert {kind for name, kind in matrices.items() if name.startswith("blk.0.")} == {"Q8_0"}
    assert {kind for name, kind in matrices.items() if name.startswith("blk.1.") or name.startswith("blk.2.ffn")} == {
        "BF16"
    }
    assert {kind for name, kind in matrices.items() if name.startswith("blk.3.")} == {"Q4_K"}


def test_rows_that_no_type_divides_stay_as_they_are_and_are_named(tmp_path):
    tiny.make(tmp_path / "model", hidden_size=256, intermediate_size=250)
    quantize(tmp_path / "model", "-o", tmp_path / "out.gguf", "--method", "nearest")
    assert types(tmp_path / "out.gguf")["blk.0.ffn_down.weight"] == "BF16"
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert "250 in-features" in report["kept"]["model.layers.0.mlp.down_proj.weight"]
    assert any("250 in-features" in warning for warning in report["warnings"])
    some = list(range(40))
    assert divergence(ours(tmp_path / "out.gguf", some), logits(tmp_path / "out.gguf", some)) < EIGHT_BITS


@pytest.mark.parametrize("name", ["qwen2-tied", "gemma3", "phi3", "qwen2_moe"])
def test_every_tensor_is_accounted_for(name, tmp_path):
    kind, changes = CASES[name]
    folder = Family(kind, {}, changes).save(tmp_path / "model")
    quantize(folder, "-o", tmp_path / "out.gguf", "--grid", "Q4_0", "--method", "nearest")
    report = json.loads((tmp_path / "out.report.json").read_text())
    weights = {w.name: w.tensor for w in Checkpoint.open(folder).weights(embedding=True)}
    quantized = {weights[row["name"]] for row in report["weights"]}
    assert quantized | report["kept"].keys() | report["dropped"].keys() == Checkpoint.open(folder).tensors().keys()
    assert not quantized & report["kept"].keys()
    assert report["output"]["quantized"] == len(report["weights"])


def test_a_tied_head_is_the_embedding_quantized_once(tmp_path):
    kind, changes = CASES["qwen2-tied"]
    folder = Family(kind, {}, {**changes, **WIDE}).save(tmp_path / "model")
    quantize(folder, "-o", tmp_path / "out.gguf", "--method", "nearest")
    found = types(tmp_path / "out.gguf")
    assert "output.weight" not in found
    assert found["token_embd.weight"] == "Q6_K"  # as llama-quantize has a head


@pytest.mark.parametrize(("name", "changes"), [("qwen3_moe", {"moe_intermediate_size": 64}), ("mixtral", {})])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_experts_apart_and_experts_in_one_tensor_give_the_same_file(name, changes, method, tmp_path):
    kind, given = CASES[name]
    text = tiny.text(tmp_path / "text.txt")
    files = {}
    for published in (True, False):
        place = tmp_path / str(published)
        folder = Family(kind, {}, {**given, **changes}, as_published=published).save(place / "model")
        fused = any(
            "experts.0." not in tensor and len(shape) == 3
            for tensor, shape in Checkpoint.open(folder).tensors().items()
        )
        assert fused != published
        quantize(
            folder,
            "-o",
            place / "out.gguf",
            "--grid",
            "Q4_0",
            "--method",
            method,
            "--calibration",
            text,
            "--samples",
            "4",
            "--length",
            "64",
        )
        files[published] = (place / "out.gguf").read_bytes()
    assert files[True] == files[False]


def test_what_stands_beside_a_file_bears_its_name(gemma, tmp_path):
    """The recipe makes the same file again, and the command for Ollama names a Modelfile that names the GGUF."""
    tiny.halfbyte(*command(gemma, "nearest", tmp_path / "a.b.gguf"))
    assert {p.name for p in tmp_path.iterdir()} == {"a.b.gguf", *(f"a.b.{name}" for name in WRITTEN)}
    assert tiny.halfbyte("quantize", "--recipe", tmp_path / "a.b.recipe.yaml", "-o", tmp_path / "again.gguf").code == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "a.b.gguf").read_bytes()
    assert (tmp_path / "a.b.Modelfile").read_text() == f'FROM ./a.b.gguf\nPARAMETER stop "{tiny.EOS}"\n'
    assert "ollama create a.b -f a.b.Modelfile\n" in (tmp_path / "a.b.README.md").read_text()


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_there_already_is_not_lost(name, gemma, tmp_path):
    (tmp_path / f"out.{name}").write_text("mine")
    words = command(gemma, "nearest", tmp_path / "out.gguf")
    tiny.refused(tiny.halfbyte(*words), f"out.{name} is in the way", "--overwrite")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(f"out.{name}", "mine")]
    assert tiny.halfbyte(*words, "--overwrite").code == 0


def test_the_default_of_a_gguf_is_its_commonest_preset(tmp_path):
    quantize(demo.MODEL, "-o", tmp_path / "model.gguf", "--method", "nearest")
    assert json.loads((tmp_path / "model.report.json").read_text())["recipe"]["grid"] == "Q4_K_M"
    assert "llama-server -m" in (tmp_path / "model.README.md").read_text()


@pytest.mark.slow
def test_an_importance_matrix_takes_the_place_of_calibration(tmp_path):
    assert (
        tiny.halfbyte("imatrix", demo.MODEL, "-o", tmp_path / "imatrix.gguf", "--samples", "8", "--length", "128").code
        == 0
    )
    quantize(
        demo.MODEL,
        "-o",
        tmp_path / "from-file.gguf",
        "--grid",
        "IQ2_M",
        "--imatrix",
        tmp_path / "imatrix.gguf",
        "--method",
        "imatrix",
    )
    quantize(demo.MODEL, "-o", tmp_path / "without.gguf", "--grid", "IQ2_M", "--method", "nearest")
    assert types(tmp_path / "from-file.gguf") == types(tmp_path / "without.gguf")
    result = tiny.halfbyte(
        "eval",
        tmp_path / "from-file.gguf",
        tmp_path / "without.gguf",
        "--against",
        demo.MODEL,
        "--windows",
        "2",
        "--json",
    )
    with_it, without = (row["kl"] for row in json.loads(result.out)["models"])
    assert with_it < 0.95 * without


# Runs that are cut off ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """Of 32 bits, and norms that are stored as 1 + w: what a file holds of them is not to the last bit what the model
    has."""
    home = tmp_path_factory.mktemp("resume")
    kind, changes = CASES["gemma3"]
    Family(kind, {}, {**changes, "num_hidden_layers": 3}).save(home / "model")
    tiny.text(home / "text.txt")
    return home


def command(home: Path, method: str, out: Path, *more: object) -> list[object]:
    sampling = ["--calibration", home / "text.txt", "--samples", "3", "--length", "64"]
    return ["quantize", home / "model", "-o", out, "--grid", "Q4_0", "--method", method, *sampling, *more]


def cut_after_first(monkeypatch, words: list[object]) -> None:
    with tiny.cut_after_each_record(monkeypatch):
        assert tiny.halfbyte(*words).code == 130


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "gptq", "awq+gptq"])
def test_a_run_that_is_cut_off_again_and_again_gives_the_same_bytes(method, gemma, tmp_path, monkeypatch):
    assert tiny.halfbyte(*command(gemma, method, tmp_path / "whole.gguf")).code == 0
    words, cuts = command(gemma, method, tmp_path / "out.gguf"), 0
    with tiny.cut_after_each_record(monkeypatch):
        while (result := tiny.halfbyte(*words)).code == 130:
            cuts += 1
            assert not (tmp_path / "out.gguf").exists()
            assert cuts < 60
    assert result.code == 0, result.err
    assert cuts >= 3
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{stem}.{end}" for stem in ("whole", "out") for end in ("gguf", *WRITTEN)
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals(number, gemma, tmp_path):
    words = command(gemma, "gptq", tmp_path / "out.gguf")
    done = subprocess.run(
        [sys.executable, "-c", tiny.CUT, str(int(number)), "2", *map(str, words)],
        capture_output=True,
        text=True,
        env=tiny.ALONE,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (130 if number == signal.SIGINT else -number)
    assert not (tmp_path / "out.gguf").exists()
    assert (tmp_path / "out.gguf.partial.jsonl").read_text().count("\n") >= 3
    assert tiny.halfbyte(*words).code == 0
    assert tiny.halfbyte(*command(gemma, "gptq", tmp_path / "whole.gguf")).code == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_flipped_byte_is_found_before_the_file_is_given_out(gemma, tmp_path, monkeypatch):
    words = command(gemma, "gptq", tmp_path / "out.gguf")
    cut_after_first(monkeypatch, words)
    partial = tmp_path / "out.gguf.partial" / "out.gguf"
    entry = gguf_file.read(partial).tensors["blk.0.ffn_up.weight"].entry
    with open(partial, "r+b") as file:
        file.seek(entry.offset + 100)
        byte = file.read(1)
        file.seek(entry.offset + 100)
        file.write(bytes([byte[0] ^ 4]))
    tiny.refused(tiny.halfbyte(*words), "model.layers.0.mlp.up_proj", "reads back as something else than was written")
    assert list(tmp_path.iterdir()) == []


def test_another_importance_matrix_starts_anew(gemma, tmp_path, monkeypatch):
    sampling = ["--calibration", gemma / "text.txt", "--length", "64"]
    for name, samples in (("a", 2), ("b", 5)):
        assert (
            tiny.halfbyte(
                "imatrix", gemma / "model", "-o", tmp_path / f"{name}.gguf", "--samples", samples, *sampling
            ).code
            == 0
        )
    quantized = ["--grid", "Q4_0", "--method", "imatrix", "--imatrix"]
    quantize(gemma / "model", "-o", tmp_path / "whole.gguf", *quantized, tmp_path / "b.gguf")
    words = ["quantize", gemma / "model", "-o", tmp_path / "out.gguf", *quantized, tmp_path / "a.gguf"]
    cut_after_first(monkeypatch, words)
    os.replace(tmp_path / "b.gguf", tmp_path / "a.gguf")
    assert tiny.halfbyte(*words).code == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_overwrite_keeps_the_old_file_until_the_new_is_whole(gemma, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    assert tiny.halfbyte(*command(gemma, "nearest", out)).code == 0
    old = out.read_bytes()
    words = command(gemma, "gptq", out, "--overwrite")
    cut_after_first(monkeypatch, words)
    assert out.read_bytes() == old
    assert tiny.halfbyte(*words).code == 0
    assert out.read_bytes() != old
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", *(f"out.{name}" for name in WRITTEN)}
