"""The needle: planted where it should be, scored as Transformers would, found by a model that reads and lost by a cache
that is too coarse."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.evaluation import needle
from halfbyte.models.checkpoint import Checkpoint

DEPTHS = (0.0, 0.5, 1.0)
MODEL = Path(demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("needle") / "source", dtype="float32", adds_bos=True)


@pytest.fixture(scope="module")
def text(source) -> str:
    return str(tiny.text(source.parent / "text.txt"))


def test_a_fact_stands_where_it_was_planted_and_the_question_at_the_end(source, text):
    planted = needle.plant(Checkpoint(source), text, 400, DEPTHS, 3, seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert planted.tokens.shape == (3 * 4, 400)
    for row, size, depth, fact in zip(planted.tokens, planted.answers, planted.depths, planted.facts, strict=True):
        assert row[0] == tokenizer.bos_token_id
        read = tokenizer.decode(row, skip_special_tokens=True)
        answer, cue = tokenizer.decode(row[-size:]), needle.CUES[fact]
        assert read.endswith(f"{cue}{answer}")
        assert read.count(f"{cue}{answer}") == (1 if depth is None else 2)
        if depth is not None:
            told = read.index(f"{cue}{answer}.") - 2  # after two line ends
            room = len(read) - 2 * len(f"\n\n{cue}{answer}") - len(".\n\n")
            assert told == pytest.approx(depth * room, abs=1)


def test_scores_are_the_log_probabilities_that_transformers_gives(source, text):
    planted = needle.plant(Checkpoint(source), text, 256, (0.5,), 2, seed=1)
    likely, found = needle.score(Checkpoint(source), planted)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        said = model(input_ids=planted.tokens).logits.log_softmax(-1)
    for row, (tokens, size) in enumerate(zip(planted.tokens, planted.answers, strict=True)):
        at = range(256 - size, 256)
        assert float(likely[row]) == pytest.approx(sum(float(said[row, i - 1, tokens[i]]) for i in at) / size, abs=1e-3)
        assert bool(found[row]) == all(int(said[row, i - 1].argmax()) == int(tokens[i]) for i in at)


@pytest.mark.slow
def test_the_command_prints_a_grid_of_depth_and_length_and_the_card_keeps_it(source, text, tmp_path):
    halfbyte.quantize(source, tmp_path / "out", method="nearest", grid="int4-g32")
    words = (
        "needle",
        tmp_path / "out",
        "--against",
        source,
        "--text",
        text,
        "--lengths",
        "256,300",
        "--depths",
        2,
        "--facts",
        1,
    )
    shown = tiny.halfbyte(*words)
    assert shown.code == 0, shown.err
    assert all(said in shown.out for said in ("256", "300", "at 0 %", "at 100 %", "→"))
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["needle"]
    assert [(row["length"], row["depth"]) for row in kept["model"]["rows"]] == [
        (256, 0.0),
        (256, 1.0),
        (300, 0.0),
        (300, 1.0),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text | depth 0 % | depth 100 % |" in card
    assert card.count(" → ") >= 4


def test_texts_that_hold_no_fact_are_refused(source, text, tmp_path):
    tiny.refused(
        tiny.halfbyte("needle", source, "--against", source, "--text", text, "--lengths", "64"), "larger --length"
    )
    tiny.refused(tiny.halfbyte("needle", source, "--against", source, "--lengths", "many"), "256,1024")


@pytest.mark.slow
def test_the_demo_model_reads_facts_back_and_only_a_coarse_cache_makes_it_forget():
    found = halfbyte.needle(
        [MODEL], MODEL, lengths=(256,), depths=2, facts=4, kv=("fp8-e4m3-token", "int4", "int2-g32")
    )
    fp8, int4, int2 = ([row["gain"] for row in model["rows"]] for model in found["models"])
    original = [row["gain"] for row in found["reference"]]
    assert min(original) > 1
    assert fp8 == pytest.approx(original, abs=0.1)
    assert int4 == pytest.approx(original, abs=0.3)
    assert all(lost < kept / 2 for lost, kept in zip(int2, original, strict=True))
