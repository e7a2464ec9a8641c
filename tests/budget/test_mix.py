"""Mixes that are made: within their budgets, by the engine's rules, and the same again from their recipes."""

import json
from pathlib import Path

import pytest

import halfbyte
import tiny
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.recipe import Recipe

GROUPS = ("int3-g32", "int4-g32", "int6-g32", "int8-channel")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("mix")
    tiny.make(home / "model", num_hidden_layers=2)
    tiny.text(home / "text.txt", 400)
    return home


def make(home: Path, out: str, **words):
    calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 48}
    words = {"sensitivities": home / f"{words.get('to', out[-4:])}.jsonl", **words}
    return halfbyte.quantize(home / "model", home / out, calibration=calibration, **words)


@pytest.mark.slow
def test_a_file_is_as_large_as_was_asked_for_at_most_and_as_was_said(home):
    report = make(home, "a.gguf", size=230_000)
    assert report.budget.file_bytes == (home / "a.gguf").stat().st_size <= 230_000 == report.budget.limit_bytes
    assert sum(report.budget.grids.values()) == len(report.weights)  # embedding and head among them
    more = make(home, "b.gguf", size=250_000)
    assert report.budget.file_bytes < more.budget.file_bytes <= 250_000
    assert 0 < more.budget.predicted_kl < report.budget.predicted_kl
    as_small = make(home, "c.gguf", max_kl=report.budget.predicted_kl * 1.0001, dry_run=True)
    assert as_small.budget.file_bytes <= report.budget.file_bytes


def test_its_recipe_makes_the_same_bytes_without_a_budget(home):
    report = make(home, "d.gguf", bits=5.5, candidates="Q4_0,Q5_0,Q8_0")
    assert set(report.budget.grids) <= {"Q4_0", "Q5_0", "Q8_0", "keep"}
    assert report.output.bits_per_parameter <= 5.5
    recipe = Recipe.load(home / "d.recipe.yaml")
    again = halfbyte.quantize(recipe, home / "e.gguf")
    assert again.budget is None
    assert (home / "d.gguf").read_bytes() == (home / "e.gguf").read_bytes()
    assert json.loads((home / "d.report.json").read_text())["budget"]["asked"] == "5.5 bits per parameter"


def test_what_engines_fuse_gets_one_grid(home):
    report = make(home, "ct", bits=9, to="compressed-tensors", engine="vllm", candidates=GROUPS)
    grids = {row.name: row.grid for row in report.weights}
    assert len(set(grids.values())) > 1
    for layer in range(2):
        own = [grids.get(f"model.layers.{layer}.self_attn.{part}_proj") for part in "qkv"]
        assert len(set(own)) == 1
        own = [grids.get(f"model.layers.{layer}.mlp.{part}_proj") for part in ("gate", "up")]
        assert len(set(own)) == 1
    assert next(engine for engine in report.engines if engine.engine == "vllm").loads


def test_groups_that_do_not_divide_a_row_are_no_candidates(tmp_path):
    tiny.make(tmp_path / "model", num_hidden_layers=1, hidden_size=96, intermediate_size=192, num_attention_heads=6)
    tiny.text(tmp_path / "text.txt", 400)
    report = make(
        tmp_path, "ct", bits=9, to="compressed-tensors", candidates="int4-g128,int4-g64,int4-g32,int8-channel"
    )
    assert {row.grid.partition("-bf16")[0] for row in report.weights if row.shape[1] == 96} <= {
        "int4-g32",
        "int8-channel",
    }


def test_what_the_recipe_names_stays_as_it_is_there(home):
    report = make(home, "own.gguf", bits=6, override={"layers.0.mlp.*": "Q8_0"}, skip="layers.1.self_attn.q_proj")
    grids = {row.name: row.grid for row in report.weights}
    assert {grids[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up", "down")} == {"int8-g32"}
    assert "model.layers.1.self_attn.q_proj" not in grids


def test_a_second_budget_measures_nothing(home, monkeypatch):
    make(home, "f.gguf", bits=5, dry_run=True)
    monkeypatch.setattr("halfbyte.budget.sensitivity.Backward", None)
    assert make(home, "f.gguf", bits=6, dry_run=True).budget.predicted_kl > 0


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_what_it_had_found(home, monkeypatch):
    from halfbyte.budget import sensitivity

    path, found = home / "killed.jsonl", []
    of_block = sensitivity._of_block

    def counted(back, block, wanted, *rest):
        if len(found) == 1:
            raise KeyboardInterrupt
        found.append(block.name)
        yield from of_block(back, block, wanted, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "_of_block", counted)
        with pytest.raises(KeyboardInterrupt):
            make(home, "g.gguf", bits=6, sensitivities=path, dry_run=True)
    known = path.read_bytes()
    assert found == ["model.layers.1"]
    whole = make(home, "g.gguf", bits=6, sensitivities=path, dry_run=True).budget
    assert path.read_bytes().startswith(known)
    unbroken = home / "unbroken.jsonl"
    assert whole == make(home, "g.gguf", bits=6, sensitivities=unbroken, dry_run=True).budget


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"bits": 1.5}, r"1.5 bits per parameter: at most .* the smallest mix takes .*; give more"),
        ({"size": "1GB"}, "there is nothing to quantize"),
        ({"bits": 5, "grid": "Q4_K_M"}, "a budget chooses grids, and --grid Q4_K_M names one"),
        ({"bits": 5, "candidates": "Q4_K,Q9_K"}, "unknown .*'Q9_K'"),
        ({"fit": "400MiB"}, "all but the weights takes"),
    ],
)
def test_what_cannot_be_is_refused(home, words, said):
    with pytest.raises(BadRequest, match=said):
        make(home, "h.gguf", **words)
    assert not (home / "h.gguf").exists()


def test_a_container_of_one_grid_is_refused(home):
    with pytest.raises(Unsupported, match="awq holds one grid for all weights"):
        make(home, "awq", to="awq", bits=6)


def test_an_output_that_exists_is_seen_before_anything_is_measured(home):
    (home / "there.gguf").write_text("mine")
    with pytest.raises(BadRequest, match="exists"):
        make(home, "there.gguf", bits=6, sensitivities=home / "unused.jsonl")
    assert not (home / "unused.jsonl").exists()


def test_memory_less_what_all_else_takes_is_for_weights(home):
    row = halfbyte.advise(home / "model", memory="1GiB", engine="llama.cpp").rows[0]
    others = row.memory_bytes - row.weights_bytes
    fitting = make(home, "i.gguf", fit=others + 400_000, dry_run=True)
    assert 350_000 < fitting.output.size_bytes <= 400_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"engine": "tensorrt-llm"}, "multiplies by none of the usual grids .* but by fp8-e4m3-channel/fp8-e4m3-token"),
        ({"engine": "mlx"}, "a budget mixes grids, and mlx reads one from awq; name one with --grid"),
        ({"engine": "transformers", "to": "gptq"}, "transformers reads one from gptq; write --to compressed-tens"),
        (
            {"engine": "sglang", "candidates": "int4-g32,int3-g32"},
            "sglang does not multiply by int3-g32 in one gptq checkpoint with int4-g32",
        ),
    ],
)
def test_engines_that_do_not_mix_say_so_before_anything_is_measured(home, words, said):
    with pytest.raises(Unsupported, match=said):
        make(home, "x", bits=6, sensitivities=home / "unused.jsonl", **words)
    assert not (home / "unused.jsonl").exists()


@pytest.mark.parametrize(
    ("engine", "to", "words"),
    [
        ("tgi", "compressed-tensors", {}),
        ("sglang", "gptq", {}),
        ("tensorrt-llm", "compressed-tensors", {"candidates": "fp8"}),
    ],
)
def test_what_is_mixed_for_an_engine_is_what_it_loads(home, engine, to, words):
    report = make(home, "y", bits=12, engine=engine, sensitivities=home / f"{engine}.jsonl", dry_run=True, **words)
    assert report.output.container == to
    assert next(found for found in report.engines if found.engine == engine).loads
