"""halfbyte in Python: what a user finds with dir(), help() and a notebook."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from beartype.door import is_subhint
from pydantic.fields import FieldInfo

import halfbyte
import tiny
from halfbyte.arguments import (
    Answering,
    Blaming,
    Caching,
    Comparing,
    Converting,
    Dequantizing,
    Evaluating,
    Fitting,
    Publishing,
    Retrieving,
    Running,
    Talking,
    Timing,
    sentence,
)
from halfbyte.budget.budget import Budget
from halfbyte.containers.table import CONTAINERS
from halfbyte.engines.engines import ENGINES
from halfbyte.grids import activations
from halfbyte.inference.sampling import Sampling
from halfbyte.recipe import METHODS, OBSERVERS, Calibration, Entries, Recipe, meaning


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.make(home / "model")
    halfbyte.quantize(home / "model", home / "int4", method="nearest", grid="int4-g32")
    return home


def test_dir_and_version_need_no_torch():
    code = "import halfbyte, sys; print(dir(halfbyte), halfbyte.__version__); assert 'torch' not in sys.modules"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=tiny.ALONE)
    assert all(name in made.stdout for name in ("quantize", "evaluate", "load", "__version__"))


@pytest.mark.parametrize("words", [Recipe, Calibration])
def test_every_entry_says_what_it_is(words):
    assert not [name for name in words.model_fields if len(meaning(name, words)) < 15]


def test_observers_are_those_of_the_table():
    assert tuple(activations.OBSERVERS) == OBSERVERS


FUNCTIONS = [name for name in halfbyte.__all__ if name not in ("Calibration", "HalfbyteError", "Recipe")]
DECLARED = {
    "quantize": (Recipe, Budget, Running),
    "convert": (Converting, Recipe, Running),
    "dequantize": (Dequantizing, Recipe, Running),
    "kv": (Caching, Recipe, Running),
    "imatrix": (Recipe, Running),
    "evaluate": (Evaluating, Running),
    "needle": (Retrieving, Running),
    "suite": (Answering, Running),
    "tasks": (Answering, Running),
    "blame": (Blaming, Running),
    "bench": (Timing, Running),
    "advise": (Fitting,),
    "generate": (Talking, Sampling, Running),
    "page": (Fitting, Running),
    "compare": (Comparing, Running),
    "push": (Publishing,),
}
"""What the arguments of functions are fields of."""


def declared(name: str) -> Iterator[tuple[inspect.Parameter, FieldInfo, type[Entries]]]:
    for own in inspect.signature(getattr(halfbyte, name)).parameters.values():
        kind = next((kind for kind in DECLARED[name] if own.name in kind.model_fields), None)
        if kind is not None and own.name != "model":
            yield own, kind.model_fields[own.name], kind


@pytest.mark.parametrize("name", DECLARED)
def test_arguments_are_those_that_are_declared(name):
    for own, field, kind in declared(name):
        taken = inspect.signature(getattr(halfbyte, name), eval_str=True).parameters[own.name].annotation
        words = Sequence[str] if field.annotation == tuple[str, ...] else field.annotation
        assert is_subhint(words, taken | None), own.name
        if own.default is own.empty:
            assert field.is_required() or (name, own.name) == ("convert", "to")
        elif own.default is not None or kind not in (Recipe, Budget, Sampling):  # None: as the recipe has it
            assert own.default == field.default, own.name
        assert f"\n        {own.name}: {sentence(own.name, kind)}" in getattr(halfbyte, name).__doc__


def test_every_word_of_a_recipe_and_of_a_budget_is_an_argument():
    taken = inspect.signature(halfbyte.quantize).parameters
    assert taken.keys() == {"out", *Recipe.model_fields, *Budget.model_fields, *Running.model_fields}
    assert not any(own.kind is own.VAR_KEYWORD for own in taken.values())
    for name in (*METHODS, *CONTAINERS, *ENGINES, *OBSERVERS, *Calibration.model_fields):
        assert name in halfbyte.quantize.__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_types_and_says_what_each_argument_is(name):
    function = getattr(halfbyte, name)
    assert "{arguments}" not in function.__doc__
    for own in inspect.signature(function).parameters.values():
        assert own.annotation is not own.empty
        assert re.search(rf"\b{own.name}\b", function.__doc__), own.name


def test_a_report_is_short_in_a_terminal_and_a_table_in_a_notebook(home, tmp_path):
    report = halfbyte.quantize(home / "model", tmp_path / "out", method="nearest", grid="int4-g32")
    assert repr(report).startswith("<Report: nearest int4-g32 as compressed-tensors, ")
    assert str(report) == repr(report)
    assert len(repr(report)) < 200
    assert "<th>worst weight</th>" in report._repr_html_()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report.as_dict()))


def test_an_evaluation_is_short_too(home, tmp_path):
    halfbyte.quantize(home / "model", tmp_path / "int4", method="nearest", grid="int4-g32")
    text = str(tiny.text(tmp_path / "text.txt"))
    found = halfbyte.evaluate(tmp_path / "int4", home / "model", text, 64, 1)
    row = found.models[0]
    assert repr(found).startswith(f"<Evaluation: int4: KL {row.kl:.5f}, perplexity {row.perplexity:.3f} (was ")
    assert f"<td>int4</td><td>{row.kl:.5f}</td>" in found._repr_html_()


def test_a_dry_run_plans_what_the_run_writes_and_writes_nothing(home, tmp_path):
    words = {"method": "gptq", "grid": "int4-g32", "skip": "layers.0.*"}
    planned = halfbyte.quantize(home / "model", tmp_path / "out", dry_run=True, **words)
    assert list(tmp_path.iterdir()) == []
    calibration = {"source": str(tiny.text(tmp_path / "text.txt")), "samples": 2, "length": 64}
    made = halfbyte.quantize(home / "model", tmp_path / "out", calibration=calibration, **words)
    assert planned["output"]["size_bytes"] == made["output"]["size_bytes"]
    assert planned["kept"] == made["kept"]
    assert [row["name"] for row in planned["weights"]] == [row["name"] for row in made["weights"]]
    result = tiny.halfbyte("quantize", home / "model", "-o", tmp_path / "other", "--dry-run")
    assert result.code == 0
    assert "nothing was written" in result.out
    assert not (tmp_path / "other").exists()


def test_progress_is_true_false_or_a_function(home, tmp_path):
    seen = []
    halfbyte.quantize(home / "model", tmp_path / "a", method="nearest", progress=lambda *step: seen.append(step))
    assert seen
    halfbyte.quantize(home / "model", tmp_path / "b", method="nearest", progress=True)
    with pytest.raises(halfbyte.HalfbyteError, match="progress is True, False, or a function"):
        halfbyte.quantize(home / "model", tmp_path / "c", method="nearest", progress=3)
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize("grid", ["int4-g32", "int8-channel/int8-token"])
def test_a_loaded_model_changes_its_precision_and_keeps_its_weights(home, tmp_path, grid):
    halfbyte.quantize(home / "model", tmp_path / "out", method="nearest", grid=grid)
    ids = torch.arange(30)[None]
    wanted = halfbyte.load(tmp_path / "out", torch.float32)(ids).logits
    assert torch.equal(halfbyte.load(tmp_path / "out").float()(ids).logits, wanted)
    assert halfbyte.load(tmp_path / "out", torch.float32).to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16


def test_texts_calibrate_as_a_file_of_them_does_and_the_recipe_holds_them(home, tmp_path):
    texts = [f"{tiny.text(tmp_path / 'text.txt', 400, seed).read_text()}: «{seed}»\n" for seed in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    words = {"method": "gptq", "grid": "int4-g32"}
    sampling = {"samples": 4, "length": 64}
    given = halfbyte.quantize(home / "model", tmp_path / "given", calibration={"source": texts, **sampling}, **words)
    filed = halfbyte.quantize(
        home / "model", tmp_path / "filed", calibration={"source": str(tmp_path / "texts.jsonl"), **sampling}, **words
    )
    assert given["calibration"]["source"] == "4 texts given"
    assert given["calibration"]["tokens_sha256"] == filed["calibration"]["tokens_sha256"]
    assert tiny.weights(tmp_path / "given") == tiny.weights(tmp_path / "filed")
    recipe = Recipe.load(tmp_path / "given" / "recipe.yaml")
    assert recipe.calibration.source == tuple(texts)
    halfbyte.quantize(recipe, tmp_path / "again")
    assert tiny.weights(tmp_path / "again") == tiny.weights(tmp_path / "given")


def test_a_list_is_a_calibration_by_itself_and_bad_ones_are_one_line(home, tmp_path):
    assert halfbyte.Recipe.of(model="m", calibration=["a", "b"]).calibration.source == ("a", "b")
    for wrong, said in (
        ([], "a list of texts"),
        (["a", 3], "a list of texts"),
        (["a" * 600_000], "write them into a .jsonl file"),
        (["\ud800"], "surrogates not allowed"),
        (["a/b"], "1 text given: the text has 3 tokens"),
    ):
        with pytest.raises(halfbyte.HalfbyteError, match=said) as caught:
            halfbyte.quantize(home / "model", tmp_path / "out", calibration=wrong)
        assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda model: halfbyte.evaluate([], model, length=1), "length is 1, and has to be a whole number, 8 at least"),
        (lambda model: halfbyte.evaluate([], model, length="64"), "length is '64'"),
        (lambda model: halfbyte.evaluate([], model, windows=0), "windows is 0, and has to be a whole"),
        (lambda model: halfbyte.blame(model, model, windows=0), "windows is 0"),
        (lambda model: halfbyte.blame(model, model, blocks=-1), "blocks is -1"),
        (lambda model: halfbyte.needle([], model, facts=0), "facts is 0"),
        (lambda model: halfbyte.needle([], model, depths=0), "depths is 0"),
    ],
)  # fmt: skip
def test_counts_that_measure_nothing_are_refused_by_name(home, wrong, said):
    with pytest.raises(halfbyte.HalfbyteError, match=said):
        wrong(home / "model")


def test_one_model_stands_for_a_list_of_it(home):
    one, listed = (
        halfbyte.evaluate(models, home / "model", windows=1, length=16, kv=kv)
        for models, kv in ((str(home / "int4"), "none"), ([home / "int4"], ["none"]))
    )
    assert one.models[0].kl == listed.models[0].kl


NO_PATH = """
import halfbyte
for call in (halfbyte.load, halfbyte.inspect, lambda path: halfbyte.evaluate([path], path)):
    try:
        call(None)
    except halfbyte.HalfbyteError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_is_no_path_is_refused_in_one_line():
    """In a process of its own, where no shapes and types are checked."""
    said = subprocess.run([sys.executable, "-c", NO_PATH], capture_output=True, text=True, check=True).stdout
    assert said == 3 * "a checkpoint is named by its folder, its file or its hub id, not by None\n"
