"""How fast is it, and why: reasons from made-up facts, engines in processes that die, and one run of three models."""

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import transformers

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.engines.engines import TIMED
from halfbyte.errors import HalfbyteError
from halfbyte.inference.timing import reasons as why
from halfbyte.inference.timing.bench import Contestant
from halfbyte.inference.timing.engines import HOMES, TimedEngine
from halfbyte.inference.timing.figures import Costs, pace
from halfbyte.inference.timing.load import Load, Seconds
from halfbyte.inference.timing.process import EngineFailed, started
from halfbyte.inference.timing.reasons import Facts
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.types import Products

PLAIN = Facts(products=[Products(way="packed, in bfloat16", grid="int4-g128", linears=9, size_bytes=100)])


def linears(way: str, grid: str = "iq2_xxs") -> Facts:
    made = Products(way=way, grid=grid, linears=3, size_bytes=300)
    return replace(PLAIN, products=[*PLAIN.products, made])


@pytest.mark.parametrize(
    ("reason", "facts", "words"),
    [
        (why.decoded_at_load, linears("held"), "no kernel multiplies by iq2_xxs as it is: 75% of the linears' bytes"),
        (why.decoded_each_time, linears("decoded"), "for each product"),
        (why.rounded_activations, linears("rounded", "int8-channel/int8-token"), "int8-channel/int8-token, 75%"),
        (why.multiplied_in_float32, linears("packed, in float32", "int8-g32"), "int8-g32 are taken in float32"),
        (why.large_head, replace(PLAIN, head_share=0.5), "the head is 50%"),
        (why.mostly_outside, replace(PLAIN, products_share=0.3), "products take 30% of a step"),
        (
            why.bound_by_arithmetic,
            replace(PLAIN, batch=64, arithmetic_share=0.7, bandwidth_share=0.2),
            "at batch 64 decoding computes more than it reads (70% of the measured arithmetic, 20%",
        ),
        (why.bound_by_bandwidth, replace(PLAIN, bandwidth_share=0.9), "reads 90% of the bandwidth"),
        (why.few_threads, replace(PLAIN, threads=2, cores=16), "2 of 16 cores"),
        (why.busy_machine, replace(PLAIN, unsteady=0.6), "repeats differ by 60%"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reason_is_given_where_it_holds_and_only_there(reason, facts, words):
    assert words in reason(facts)
    assert not reason(PLAIN)
    every = [*why.OF_SPEED, *why.OF_THE_RUN]
    assert [one for one in every if one(facts)] == [reason]


def test_smaller_but_not_faster_has_its_reason_or_says_that_there_is_none():
    smaller = {"size_ratio": 0.3, "decode_ratio": 0.95}
    assert why.reasons([replace(linears("held"), **smaller)])[0] == (
        "30% of the original's bytes, but 0.95 times as fast at batch 1"
    )
    assert why.reasons([replace(PLAIN, **smaller)])[1:] == ["what was measured does not say why"]
    assert why.reasons([replace(PLAIN, size_ratio=0.3, decode_ratio=2.5)]) == []
    assert why.reasons([replace(PLAIN, size_ratio=1.0, decode_ratio=1.0)]) == []


def test_what_is_computed_and_what_is_read_of_a_token():
    costs = Costs.of(Checkpoint.open(demo.MODEL), False, [])
    bytes_ = (demo.MODEL / "model.safetensors").stat().st_size
    assert costs.size_bytes == pytest.approx(bytes_, rel=0.01)
    assert costs.weights.read(1) == costs.size_bytes  # its head is the embedding, which is read as a whole
    load = Load(batch=2, prompt=64, tokens=10)
    found = pace(load, [Seconds(2.0, 1.0), Seconds(4.0, 0.5), Seconds(8.0, 0.25)], costs, 1e9, 1e12)
    assert (found.prefill.low, found.prefill.median, found.prefill.high) == (16.0, 32.0, 64.0)
    assert (found.first_token.median, found.decode.median) == (4.0, 40.0)
    assert found.decode_share == pytest.approx(20 * costs.decode_bytes(load) / 1e9)
    assert costs.decode_bytes(load) - costs.weights.read(2) == pytest.approx(
        2 * 69 * cache_bytes_of_a_token(demo.MODEL)
    )


def cache_bytes_of_a_token(model) -> int:
    config = json.loads((model / "config.json").read_text())
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


DYING = """
import os
class Dying:
    def open(self, path, threads, plainly=False):
        if not plainly:
            os.abort()
        return {"load_seconds": 0.1, "version": "1"}
    def run(self, batch, prompt, tokens):
        print("what a library prints is no answer")
        return 0.5, 0.25
class Raising:
    def open(self):
        raise RuntimeError("it does not know this model")
"""


@pytest.fixture
def dying(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("dying")
def test_an_engine_that_dies_says_of_what_in_a_line():
    with started("dying:Dying", False, 1, os.environ) as process, pytest.raises(EngineFailed) as killed:
        process.call("open", path="", threads=1)
    assert (str(killed.value), killed.value.signal_name) == ("it was ended by SIGABRT", "SIGABRT")
    with started("dying:Raising", False, 1, os.environ) as process, pytest.raises(EngineFailed) as raised:
        process.call("open")
    assert "it does not know this model" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("dying")
def test_an_engine_that_is_killed_is_opened_more_plainly():
    row = TimedEngine("dying:Dying", "dying", plainer={"plainly": True}, about_plainer="it was ended by {0}")
    one = Contestant(Checkpoint.open(demo.MODEL), "dying", row, {})
    with ExitStack() as stack:
        one.start(stack, 1, [Load(1, 4, 2)])
        one.time(Load(1, 4, 2))
    assert (one.failed, one.notes, one.opened["version"]) == (None, ["it was ended by SIGABRT"], "1")
    assert one.seconds == {Load(1, 4, 2): [(0.5, 0.25)]}


def test_engines_by_name_are_those_that_have_a_home():
    assert HOMES.keys() == {*TIMED}


@pytest.mark.slow
def test_both_engines_run_the_same_sequences(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")
    from halfbyte.inference.timing.in_llama_cpp import InLlamaCpp
    from halfbyte.inference.timing.in_transformers import InTransformers

    halfbyte.quantize(demo.MODEL, tmp_path / "model.gguf", method="nearest", grid="Q8_0")
    said = {InLlamaCpp: [], InTransformers: []}
    read, step = InLlamaCpp._read, InTransformers._step

    def reading(self, *words):
        said[InLlamaCpp].append(read(self, *words))
        return said[InLlamaCpp][-1]

    def stepping(self, *words):
        cache, chosen = step(self, *words)
        said[InTransformers].append(chosen[:, 0].tolist())
        return cache, chosen

    monkeypatch.setattr(InLlamaCpp, "_read", reading)
    monkeypatch.setattr(InTransformers, "_step", stepping)
    for engine, words in ((InLlamaCpp(), {"laid_out_anew": False}), (InTransformers(), {})):
        engine.open(str(tmp_path / "model.gguf"), 1, "cpu", 4096, **words)
        assert min(engine.run(batch=3, prompt=20, tokens=4)) > 0
    assert [len(tokens) for tokens in said[InTransformers]] == [3] * 5
    assert said[InLlamaCpp] == said[InTransformers]
    assert len({*said[InTransformers][0]}) > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")
    gguf = tmp_path_factory.mktemp("bench") / "model.gguf"
    halfbyte.quantize(demo.MODEL, gguf, method="nearest", grid="Q4_0")
    return gguf, halfbyte.bench(gguf, demo.MODEL, tokens=3, prompt=8, batch=[1, 2], repeats=2, card=True)


@pytest.mark.slow
def test_models_in_engines_beside_their_original(run):
    gguf, result = run
    assert [(row.path, row.engine) for row in result.models] == [(str(gguf), "halfbyte"), (str(gguf), "llama.cpp")]
    assert [(row.engine, row.dtype) for row in result.reference] == [("halfbyte", "bfloat16")]
    assert (result.failed, result.in_turn, result.as_dict()["schema_version"]) == ({}, True, 1)
    assert {name: rate.median > 1e9 for name, rate in result.machine.arithmetic.items()} == {
        "bfloat16": True,
        "float32": True,
    }
    for row in (*result.models, *result.reference):
        assert [(pace.batch, pace.prompt) for pace in row.paces] == [(1, 8), (2, 8)]
        assert row.load_seconds > 0
        assert row.memory_bytes is None or row.memory_bytes > row.size_bytes
        for pace_ in row.paces:
            assert 0 < pace_.decode.low <= pace_.decode.median <= pace_.decode.high
            assert 0 < pace_.decode_share < 1.2
    ours, (original,) = result.models[0], result.reference
    assert {row.way.partition(",")[0] for row in ours.products} == {"packed"}
    assert sum(row.linears for row in ours.products) == sum(row.linears for row in original.products)
    assert ours.compared_with == "halfbyte"
    assert ours.paces[0].decode_ratio == pytest.approx(ours.paces[0].decode.median / original.paces[0].decode.median)
    assert ours.read_bytes < original.read_bytes / 2
    assert "vllm is not installed" in result.left_out["vllm"]


@pytest.mark.slow
def test_it_is_put_into_report_card_and_page(run, tmp_path):
    gguf, result = run
    report = json.loads(gguf.with_suffix(".report.json").read_text())
    assert [row["engine"] for row in report["speed"]["models"]] == ["halfbyte", "llama.cpp"]
    card = gguf.with_suffix(".README.md").read_text()
    assert "## Speed" in card
    assert f"{result.models[0].paces[0].decode.median:.1f}" in card
    assert str(gguf.parent) not in card
    pytest.importorskip("vl_convert", reason="pip install 'halfbyte[report]'")
    halfbyte.page(gguf, tmp_path / "page.html")
    assert 'class="speeds"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--engine", "vlm"], "unknown engine 'vlm'; did you mean vllm?"),
        (["--engine", "sglang"], "halfbyte does not time SGLang; it times halfbyte, llama.cpp, vllm"),
        (["--engine", "llama.cpp"], "llama.cpp does not read safetensors: write gguf"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
        (["--batch", "1,x"], "--batch takes numbers, such as 1,4, not '1,x'"),
        (["--batch", "0"], "batch is 0, and has to be a whole number, 1 at least"),
        (["--activations", "int4"], "unknown way to take activations 'int4'"),
        (["--context", "16,99999"], "reads at most 1024 tokens at once, and a prompt with its answer has 100128"),
        (["--against", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(words, reason):
    tiny.refused(tiny.halfbyte("bench", demo.MODEL, *words), reason)


def test_an_engine_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(HalfbyteError, match="vllm is not installed"):
        halfbyte.bench(demo.MODEL, engines="vllm")


def test_what_is_no_decoder_is_refused(tmp_path):
    sizes = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=64)).save_pretrained(
        tmp_path / "bert"
    )
    tiny.refused(tiny.halfbyte("bench", tmp_path / "bert"), "bert is no decoder, so it answers nothing")


def test_what_does_not_fit_in_memory_is_refused_before_it_is_loaded(monkeypatch):
    from halfbyte.inference import memory

    kind = memory.kind_of("cpu")
    monkeypatch.setattr(memory, "kind_of", lambda _: replace(kind, free_bytes=lambda _: 10_000_000))
    with pytest.raises(HalfbyteError, match=r"takes .* of memory, .* are free; .* would"):
        halfbyte.bench(demo.MODEL)
