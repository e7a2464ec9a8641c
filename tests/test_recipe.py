"""Recipes: words to a plan, from YAML, options and Python alike, and back."""

from pathlib import Path

import pytest
import yaml

import halfbyte
import tiny
from halfbyte.errors import BadRequest, HalfbyteError, UnknownName, Unsupported
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.report.written import as_json

WORDS = {
    "method": "gptq",
    "grid": "int4-g64-asym",
    "to": "gptq",
    "engine": "none",  # which reads several grids with zero points from gptq
    "skip": ["layers.1.mlp.up_proj"],
    "override": {"layers.0.mlp.*": "int8-channel"},
    "head": True,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("recipe")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    return home


def calibrated(home: Path) -> dict:
    return {"calibration": {"source": str(home / "text.txt"), "samples": 4, "length": 64}}


def test_the_written_recipe_gives_the_same_bytes(home, tmp_path):
    """From Python to a folder; from the folder's recipe.yaml, by the command line, to the same folder."""
    report = halfbyte.quantize(home / "model", tmp_path / "a", **WORDS, **calibrated(home))
    assert as_json(report) == (tmp_path / "a" / "report.json").read_text()
    assert tiny.halfbyte("quantize", "--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b").code == 0
    for name in sorted(p.name for p in (tmp_path / "a").iterdir()):
        if name not in ("report.json", "README.md"):  # they hold times and paths
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_conversion_has_a_recipe_too(home, tmp_path):
    halfbyte.quantize(home / "model", tmp_path / "q", method="nearest", grid="int4-g64", to="gptq")
    halfbyte.convert(tmp_path / "q", tmp_path / "a", "awq")
    assert tiny.halfbyte("quantize", "--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b").code == 0
    assert tiny.weights(tmp_path / "a") == tiny.weights(tmp_path / "b")


def test_options_win_over_the_recipe(home, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": "elsewhere", "head": True, **WORDS, **calibrated(home)}))
    options = [
        "--method",
        "nearest",
        "--grid",
        "int8-g64",
        "--seed",
        "7",
        "--no-head",
        "--skip",
        "layers.0.*",
        "--override",
        "layers.1.mlp.*=int4-g64",
    ]
    said = tiny.halfbyte("quantize", home / "model", "--recipe", recipe, "-o", tmp_path / "q", *options)
    assert said.code == 0, said.err
    assert yaml.safe_load((tmp_path / "q" / "recipe.yaml").read_text()) == {
        "model": str(home / "model"), "requantize": False, "method": "nearest", "grid": "int8-g64", "to": "gptq",
        "engine": "none",
        "observer": "max", "head": False,
        "pure": False,
        "skip": ["layers.0.*"], "override": {"layers.1.mlp.*": "int4-g64"},
        "calibration": {**calibrated(home)["calibration"], "seed": 7},
    }  # fmt: skip


def test_python_takes_a_recipe(home, tmp_path):
    recipe = Recipe.of(model=str(home / "model"), grid="int8-g64", method="nearest")
    report = halfbyte.quantize(recipe, tmp_path / "q", grid="int4-g64", calibration="unused.txt")
    assert report["recipe"]["grid"] == "int4-g64"
    assert report["recipe"]["calibration"]["source"] == "unused.txt"
    with pytest.raises(BadRequest):
        halfbyte.quantize(recipe, tmp_path / "q", skip=3)


def test_shorthands():
    assert Recipe.of(model="m", calibration="a.txt").calibration.source == "a.txt"
    assert Recipe.of(model="m", skip="lm_head").skip == ("lm_head",)


@pytest.mark.parametrize(("text", "says"), {
    "metod: gptq": "unknown recipe entry 'metod'; did you mean method",
    "calibration: {sample: 3}": "unknown recipe entry 'calibration.sample'; did you mean calibration.samples",
    "- a": "no mapping",
    "": "no mapping",
    "1: 2": "no mapping",
    "a: [": "line",
    "\t": "cannot be read",
    "a: !!python/object/apply:os.system ['true']": "cannot be read",
    "head: maybe": "head",
    "method: true": "method",
    "method:": "method",
    "calibration:": "calibration",
    "override: [a]": "override",
    "shard_gb: 0": "shard_gb",
    "shard_gb: .nan": "shard_gb",
    "calibration: {seed: 99999999999999999999}": "calibration.seed",
    "method: convert": "needs a container in the recipe's entry 'to'",
    "method: nearest\ngrid: int9-g128": "unknown grid 'int9-g128'",
}.items())  # fmt: skip
def test_bad_recipes(text, says, home, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    tiny.refused(
        tiny.halfbyte("quantize", home / "model", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out"), says
    )
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_recipe_without_a_model(tmp_path):
    (tmp_path / "r.yaml").write_text("method: nearest")
    tiny.refused(
        tiny.halfbyte("quantize", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out"), "the recipe has no model"
    )


def test_every_refusal_is_of_one_tree(home):
    for words in ({"grid": "x"}, {"method": "x"}, {"to": "x"}, {"engine": "x"}):
        with pytest.raises(UnknownName):
            resolve(Recipe.of(model=str(home / "model"), **words))
    with pytest.raises(Unsupported):
        resolve(Recipe.of(model=str(home / "model"), to="awq", grid="int8-g64"))
    assert issubclass(UnknownName, halfbyte.HalfbyteError)
    assert issubclass(Unsupported, HalfbyteError)


@pytest.mark.parametrize(
    ("engine", "grid", "container"),
    [
        ("sglang", "int4-g64", "gptq"),
        ("sglang", "w8a8", "compressed-tensors"),
        ("tgi", "fp8", "compressed-tensors"),
        ("vllm", "nf4", "bitsandbytes"),
        ("transformers", "llm-int8", "bitsandbytes"),
        ("llama.cpp", "q4_0", "gguf"),
    ],
)
def test_an_engine_gets_a_container_in_which_it_reads_the_grid(engine, grid, container, home):
    assert (
        resolve(Recipe(model=str(home / "model"), engine=engine, grid=grid, method="nearest")).target.name == container
    )


def test_smaller_groups_where_a_row_is_no_multiple(tmp_path):
    tiny.make(tmp_path / "model", intermediate_size=160)
    words = {"method": "nearest", "grid": "int4-g64"}
    with pytest.raises(
        Unsupported,
        match=r"does not divide the 160 in-features of .*down_proj; groups of 32 would fit \(--smaller-groups takes 32",
    ):
        halfbyte.quantize(tmp_path / "model", tmp_path / "q", **words)
    with pytest.raises(Unsupported, match=r"int4-g100.* does not divide the 160 in-features .*groups of 32 would fit"):
        halfbyte.quantize(tmp_path / "model", tmp_path / "q", method="nearest", grid="int4-g100")
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "q", smaller_groups=True, **words)
    grids = {row["grid"] for row in report["weights"] if "down_proj" in row["name"]}
    assert grids == {"int4-g32-bf16"}
    assert report["warnings"] == ["2 weights: int4-g64-bf16 does not divide 160 in-features"]
    with pytest.raises(
        Unsupported,
        match=r"does not divide the 160 in-features of .*awq holds one grid for all; groups of 32 would fit",
    ):
        halfbyte.quantize(tmp_path / "model", tmp_path / "a", to="awq", smaller_groups=True, **words)


def test_smaller_groups_where_no_grid_was_named(tmp_path):
    tiny.make(tmp_path / "model", intermediate_size=160)
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "q", method="nearest")
    assert {row["grid"] for row in report["weights"]} == {"int4-g128-bf16", "int4-g32-bf16"}
    halfbyte.quantize(Recipe.load(tmp_path / "q" / "recipe.yaml"), tmp_path / "again")
    assert tiny.weights(tmp_path / "again") == tiny.weights(tmp_path / "q")


def test_names_of_the_package():
    """`halfbyte.evaluate` is the function, also when the modules behind it have been imported."""
    assert all(callable(getattr(halfbyte, name)) for name in halfbyte.__all__)
    with pytest.raises(AttributeError):
        halfbyte.nonsense  # noqa: B018


def test_an_entry_under_its_old_name_can_be_overridden(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\ninput_range: percentile\n")
    assert Recipe.load(tmp_path / "recipe.yaml").observer == "percentile"
    assert Recipe.load(tmp_path / "recipe.yaml", observer="mse").observer == "mse"
    assert Recipe.load(tmp_path / "recipe.yaml", input_range="max").observer == "max"
