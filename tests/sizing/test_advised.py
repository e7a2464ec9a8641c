"""What `plan` says and recommends; the textbook's table and advice come out of it."""

import io
import json
import shlex

import pytest
from outlines import outline
from rich.console import Console

import halfbyte
import tiny
from halfbyte import demo, display
from halfbyte.errors import BadRequest
from halfbyte.sizing import advice
from halfbyte.sizing.choices import choices
from halfbyte.sizing.losses import losses
from halfbyte.sizing.question import question
from halfbyte.sizing.types import Advice, Row

GIB = 1 << 30
SHORT = ("--samples", "2", "--length", "64")


@pytest.fixture(autouse=True)
def outlines(monkeypatch):
    """Models by the names that published.yaml has for them; all others as they are."""
    opened = advice.opened
    monkeypatch.setattr(advice, "opened", lambda source: outline(source) if source in KNOWN else opened(source))


KNOWN = ("llama-3.1-70b", "llama-3.1-8b", "qwen3-0.6b")


def plan(model: str, **words) -> Advice:
    return advice.advise(model, question(**words))


def row(found: Advice, scheme: str) -> Row:
    return next(row for row in found.rows if row.scheme == scheme)


def test_the_textbooks_table():
    """70 billion parameters: 140 GB in FP16; 39 GB in 4 bits with groups of 128, which fit an L40S."""
    found = plan("llama-3.1-70b", device="l40s", engine="vllm")
    assert row(found, "16 bits").file_bytes / 1e9 == pytest.approx(140, rel=0.02)
    assert row(found, "int4-g128").file_bytes / 1e9 == pytest.approx(39, rel=0.02)
    assert row(found, "int4-g128").fits is True
    assert row(found, "fp8").fits is False
    assert row(found, "16 bits").cards == 4
    assert found.recommendation.scheme == "int4-g128"
    assert "where fp8 would take" in found.recommendation.reason


@pytest.mark.parametrize(
    ("model", "words", "scheme", "engine"),
    [
        ("llama-3.1-70b", {"device": "h100", "cards": 2}, "fp8", "vllm"),
        ("llama-3.1-70b", {"device": "h200", "batch": 8}, "fp8", "vllm"),
        ("llama-3.1-8b", {"device": "a100-80gb", "batch": 64}, "int4-g128", "vllm"),
        ("llama-3.1-8b", {"device": "m3"}, "Q4_K_M", "llama.cpp"),
        ("llama-3.1-8b", {"device": "rtx-4060"}, "Q4_K_M", "llama.cpp"),
        ("llama-3.1-8b", {"memory": "8GiB"}, "Q4_K_M", "llama.cpp"),
        ("llama-3.1-8b", {"memory": "4GiB", "context": 2048}, "IQ3_XXS", "llama.cpp"),
        ("llama-3.1-8b", {"device": "t4", "engine": "transformers"}, "nf4", "transformers"),
        ("llama-3.1-70b", {"device": "b200"}, "nvfp4-fp8", "vllm"),
        ("llama-3.1-8b", {"device": "rtx-5090", "engine": "vllm"}, "nvfp4-fp8", "vllm"),
        ("llama-3.1-8b", {"device": "rtx-4090", "engine": "vllm"}, "fp8", "vllm"),
    ],
)
def test_the_textbooks_advice(model, words, scheme, engine):
    """Hopper: FP8; many users: 4 bits by AWQ or GPTQ; a laptop: Q4_K_M; a quick trial: NF4; and NVFP4 on Blackwell."""
    best = plan(model, **words).recommendation
    assert (best.scheme, best.engine) == (scheme, engine)
    assert best.reason
    if scheme == "int4-g128":
        assert best.words["method"] == "gptq"


@pytest.mark.slow
def test_cards_and_degrees():
    found = row(plan("llama-3.1-70b", device="h100", engine="vllm"), "16 bits")
    assert found.cards == 2
    assert found.tensor_parallel == (2, 4, 8)
    assert plan("llama-3.1-70b", device="rtx-4090", engine="vllm").recommendation.cards == 4
    assert row(plan("llama-3.1-70b", device="h100", engine="vllm", cards=3), "fp8").fits is False  # 64 heads, 3 cards


def test_speed_is_a_roofline():
    """An H100 of 3350 GB/s reads 16.06 GB at most 208 times a second, and 989e12 are 65,000 tokens' products."""
    found = row(plan("llama-3.1-8b", device="h100", engine="vllm", context=16), "16 bits")
    read = (found.file_bytes - 128256 * 4096 * 2) + found.cache_bytes
    assert found.decode_tokens == pytest.approx(3350e9 / read)
    assert found.prefill_tokens == pytest.approx(989e12 / (2 * 7.50e9), rel=0.01)
    many = row(plan("llama-3.1-8b", device="h100", engine="vllm", context=16, batch=512), "16 bits")
    assert many.decode_tokens > 50 * found.decode_tokens


@pytest.mark.slow
def test_what_is_not_known_is_not_guessed():
    found = plan("llama-3.1-8b", memory="24GiB")
    assert all(row.decode_tokens is None and row.prefill_tokens is None for row in found.rows)
    assert any("speed is not known" in note for note in found.notes)
    found = plan("llama-3.1-8b", device="ddr5-5600-x2")
    assert all(row.fits is None for row in found.rows)
    assert found.recommendation.scheme == "Q4_K_M"
    assert row(plan("llama-3.1-8b", device="b200", engine="vllm"), "w8a8").kernel is None


def test_losses_say_where_they_are_from():
    assert all(loss.source and loss.model and 0 < loss.kl < 2 for loss in losses())
    assert row(plan("llama-3.1-8b", device="m3"), "Q4_K_M").loss.model == "Llama-3-8B"


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3.1-70b"])
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "transformers"])
def test_losses_of_a_table_are_of_one_model(model, engine):
    lost = [row for row in plan(model, memory="200GiB", engine=engine).rows if row.loss]
    assert len({row.loss.model for row in lost}) == 1


def test_more_bits_lose_less():
    lost = [row for row in plan("llama-3.1-70b", memory="200GiB").rows if row.loss]
    assert len(lost) == len(choices()["llama.cpp"]) - 1
    sizes = [row.file_bytes for row in sorted(lost, key=lambda row: row.loss.kl)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"engine": "tensorrt-llm"}, "is not known"),
        ({"engine": "llama.cpp", "cache": "fp8"}, "it has 16 bits, q8_0, q4_0"),
        ({"cache": "int3"}, "unknown cache"),
        ({"batch": 0}, "has to be 1 at least"),
        ({"device": "l40s", "memory": "8GB"}, "not both"),
    ],
)
def test_wrong_words(words, told):
    with pytest.raises(BadRequest, match=told):
        question(**words)


def test_the_command_in_80_columns(tmp_path):
    words = ("plan", demo.MODEL, "--device", "rtx-4090", "--engine", "vllm", "--batch", "8")
    done = tiny.halfbyte(*words)
    assert done.code == 0
    assert "take fp8: " in done.out
    assert "roofline" in done.out
    found = json.loads(tiny.halfbyte(*words, "--json").out)
    assert found["schema_version"] == 1
    assert {r["scheme"] for r in found["rows"]} == {"16 bits", "fp8", "w8a8", "nvfp4-fp8", "nvfp4", "int4-g128"}
    console = Console(width=80, file=io.StringIO())
    for part in display.advised(plan("llama-3.1-70b", device="l40s")):
        if not isinstance(part, str):
            console.print(part)
    assert all(len(line) <= 80 for line in console.file.getvalue().splitlines())


SLOWER = [pytest.param(where, marks=pytest.mark.slow) for where in ("ollama", "vllm@rtx-4090")]


@pytest.mark.parametrize("where", ["transformers@t4", *SLOWER])
def test_the_recommended_command_works(where, tmp_path, monkeypatch):
    """As it is typed, but for less calibration."""
    monkeypatch.chdir(tmp_path)
    engine, _, device = where.partition("@")
    told = halfbyte.advise(demo.MODEL, engine=engine, device=device or None).recommendation
    words = shlex.split(told.command)
    assert words[:2] == ["halfbyte", "quantize"]
    done = tiny.halfbyte(*words[1:], *SHORT)
    assert done.code == 0, done.err
    assert (tmp_path / told.output).exists()
    report = halfbyte.inspect(tmp_path / told.output)
    assert report.size_bytes == next(r for r in halfbyte.advise(demo.MODEL, engine=engine, device=device or None).rows
                                     if r.scheme == told.scheme).file_bytes  # fmt: skip


@pytest.mark.slow
def test_a_newcomer_is_told_what_was_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tiny.halfbyte("quantize", demo.MODEL, *SHORT)
    assert done.code == 0, done.err
    assert done.out.startswith("Q4_K_M for llama.cpp: ")
    assert (tmp_path / "model-Q4_K_M.gguf").is_file()


def test_for_takes_the_recommendation(tmp_path):
    done = tiny.halfbyte("quantize", demo.MODEL, "--for", "transformers@t4", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    assert "nf4 for transformers: a quick trial" in done.out


def test_a_default_is_said_to_be_one(tmp_path):
    done = tiny.halfbyte("quantize", demo.MODEL, "-o", tmp_path / "out", "--dry-run")
    assert "int4-g128 is the default, as no scheme was asked for; what suits a device: halfbyte plan" in done.out
    done = tiny.halfbyte("quantize", demo.MODEL, "-o", tmp_path / "out", "--dry-run", "--grid", "fp8")
    assert "as no scheme was asked for" not in done.out


def test_what_is_quantized_already_stays(tmp_path):
    halfbyte.quantize(demo.MODEL, tmp_path / "m.gguf", method="minmax", grid="Q8_0")
    done = tiny.halfbyte("plan", tmp_path / "m.gguf", "--memory", "8GiB")
    assert "as it is: " in done.out
    assert "it fits as it is" in done.out
    tiny.refused(tiny.halfbyte("quantize", tmp_path / "m.gguf", "--for", "ollama"), "no scheme fits")
