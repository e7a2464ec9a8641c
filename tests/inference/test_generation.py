"""Answers token by token, against Transformers' own `generate`; refusals before anything is loaded or read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import GenerationConfig

import halfbyte
import tiny
from halfbyte import demo, multiplying, nn
from halfbyte.errors import BadCheckpoint, BadRequest
from halfbyte.inference import memory
from halfbyte.inference.generation import CachedSequence, Generation, Sampling
from halfbyte.inference.model import Answering
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES, every

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def bookworm() -> Answering:
    return Answering.open(demo.MODEL, device="cpu", dtype="float32")


def generated(model, tokens: list[int], seed: int | None = None, **settings) -> list[int]:
    """By Transformers."""
    if seed is not None:
        torch.manual_seed(seed)
    ids = torch.tensor([tokens])
    config = GenerationConfig(pad_token_id=0, use_cache=True, **{"do_sample": seed is not None, **settings})
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(tokens) :].tolist()


def tokens_of(generation: Generation) -> list[int]:
    return [token for piece in generation for token in piece.tokens]


def answering(model, **parts) -> Answering:
    """Of a model that no checkpoint holds."""
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(chr, tokens)))
    made = {"checkpoint": Checkpoint.open(demo.MODEL), "tokenizer": tokenizer, "template": None, **parts}
    return Answering(model=model, context=64, device=torch.device("cpu"), **{"ends": frozenset(), **made})


@pytest.mark.parametrize("name", every())
def test_greedy_answers_are_those_of_transformers(name):
    """State spaces, windows, experts, latents; and a sequence that goes on from what is cached is read as a whole
    one."""
    model = FAMILIES[name].build()
    prompt = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = generated(model, prompt, max_new_tokens=16)
    ends = frozenset({257} if len(wanted) < 16 else ())
    found = Generation(answering(model, ends=ends), prompt, Sampling(max_tokens=16))
    assert tokens_of(found) == wanted
    assert found.finish_reason == ("stop" if ends else "length")
    sequence = CachedSequence(model)
    sequence.read(prompt[:30])
    for part in (prompt, [*prompt[:20], *prompt[:5]]):  # longer, and another from some place on
        kept = sequence.keep_prefix(part)
        logits, alone = sequence.read(part[kept:]), CachedSequence(model).read(part)
        assert sequence.tokens == part
        limit = 1e-4 if model.dtype == torch.float32 else 0.1
        assert (logits - alone).abs().max() < limit * alone.std()


def test_windows_that_slid_are_read_again():
    model = replace(FAMILIES["gemma3"], config={**FAMILIES["gemma3"].config, "sliding_window": 8}).build()
    prompt = list(range(1, 31))
    assert tokens_of(Generation(answering(model), prompt, Sampling(max_tokens=8))) == generated(
        model, prompt, max_new_tokens=8, eos_token_id=None
    )
    sequence = CachedSequence(model)
    sequence.read(prompt)
    for part in ([*prompt, 40, 41], [*prompt[:25], 50, 51, 52]):
        kept = sequence.keep_prefix(part)
        torch.testing.assert_close(sequence.read(part[kept:]), CachedSequence(model).read(part), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.2},
        {"temperature": 1.5, "min_p": 0.05, "top_k": 50},
    ],
)
def test_drawn_tokens_are_those_of_transformers(bookworm, settings):
    prompt = bookworm.encode(PROMPT)
    wanted = generated(bookworm.model, prompt, seed=7, max_new_tokens=20, **{"top_k": 0, **settings})
    sampling = Sampling(**settings, seed=7, max_tokens=20)
    assert tokens_of(Generation(bookworm, prompt, sampling)) == wanted
    penalty = {"repetition_penalty": 1.3, "max_tokens": 20}
    assert tokens_of(Generation(bookworm, prompt, Sampling(**penalty))) == generated(
        bookworm.model, prompt, max_new_tokens=20, repetition_penalty=1.3
    )


def test_log_probabilities_are_the_models(bookworm):
    prompt = bookworm.encode(PROMPT)
    pieces = list(Generation(bookworm, prompt, Sampling(max_tokens=5, logprobs=3, temperature=0.8, seed=1)))
    tokens = [token for piece in pieces for token in piece.tokens]
    with torch.no_grad():
        logits = bookworm.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    for row, token, piece in zip(logits.log_softmax(-1), tokens, pieces, strict=True):
        (found,) = piece.logprobs
        assert (found.token, len(found.top)) == (token, 3)
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in found.top] == row.topk(3).indices.tolist()


def test_two_answers_by_turns_are_what_each_is_alone(bookworm):
    prompts = [bookworm.encode(PROMPT), bookworm.encode("It was")]
    alone = [tokens_of(Generation(bookworm, prompt, Sampling(max_tokens=12))) for prompt in prompts]
    first, second = (Generation(bookworm, prompt, Sampling(max_tokens=12)) for prompt in prompts)
    pairs = list(zip(first, second, strict=True))
    assert [[pair[n].tokens[0] for pair in pairs] for n in range(2)] == alone
    third = Generation(bookworm, prompts[0], Sampling(max_tokens=12))
    next(third)
    third.close()
    assert list(third) == []
    assert third.completion_tokens == 1


def test_an_answer_ends_where_the_context_does(bookworm):
    short = replace(bookworm, context=len(bookworm.encode(PROMPT)) + 3)
    found = Generation(short, short.encode(PROMPT), Sampling())
    assert len(tokens_of(found)) == 3
    assert found.finish_reason == "length"
    assert (found.prompt_tokens, found.completion_tokens) == (len(short.encode(PROMPT)), 3)
    assert found.prefill_seconds > 0
    assert found.decode_seconds > 0
    with pytest.raises(BadRequest, match=r"the prompt has .* tokens, and the context"):
        Generation(short, short.encode(PROMPT * 4), Sampling())


@pytest.mark.parametrize(
    ("tokens", "said"), [([], "the prompt is empty"), ([3, -1], "has token -1"), ([10**6], "has token 1000000")]
)
def test_prompts_that_cannot_be_read(bookworm, tokens, said):
    with pytest.raises(BadRequest, match=said):
        Generation(bookworm, tokens, Sampling())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"temperature": -1}, "temperature: .*-1"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_sampling_that_is_none(words, said):
    with pytest.raises(BadRequest, match=said):
        Sampling.of({"seed": 3}, words)


def test_later_words_of_sampling_win():
    assert Sampling.of({"temperature": 0.5, "seed": 1}, {"temperature": None, "seed": 2}) == Sampling(
        temperature=0.5, seed=2
    )


def test_what_is_no_number_is_refused(bookworm):
    model = FAMILIES["llama"].build().requires_grad_(False)
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(BadCheckpoint, match="model predicts nan after 3 tokens, computed in float32"):
        next(Generation(answering(model), [1, 2, 3], Sampling()))


def test_an_interrupted_pass_leaves_no_half_cache(bookworm, monkeypatch):
    sequence, prompt = CachedSequence(bookworm.model), bookworm.encode(PROMPT)
    sequence.read(prompt[:-1])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = bookworm.model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sequence.read(prompt[-1:])
    handle.remove()
    assert sequence.tokens == []
    assert sequence.keep_prefix(prompt) == 0
    torch.testing.assert_close(sequence.read(prompt), CachedSequence(bookworm.model).read(prompt))


def free(monkeypatch, size_bytes: int) -> None:
    kind = SimpleNamespace(free_bytes=lambda _: size_bytes, is_host=True)
    for module in (memory, multiplying):
        monkeypatch.setattr(module, "kind_of", lambda _: kind)


def test_what_does_not_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    folder = tiny.make(tmp_path / "model")
    loads = []
    monkeypatch.setattr(nn, "built", lambda *_: loads.append(_))
    free(monkeypatch, 500_000)
    with pytest.raises(BadRequest, match=r"takes 0.73 MB of memory.* 0.50 MB of cpu are free; .*--fit 0.50MB"):
        Answering.open(folder, device="cpu")
    free(monkeypatch, 1_300_000)
    with pytest.raises(BadRequest, match=r"; --context \d+ would fit"):
        Answering.open(folder, device="cpu")
    assert loads == []


def test_the_context_is_what_there_is_memory_for(tmp_path, monkeypatch):
    folder = tiny.make(tmp_path / "model", max_position_embeddings=4096)
    with pytest.raises(BadRequest, match="reads at most 4096 tokens at once, not 5000"):
        Answering.open(folder, device="cpu", context=5000)
    assert Answering.open(folder, device="cpu").context == 4096
    free(monkeypatch, 8_000_000)
    limited = Answering.open(folder, device="cpu")
    assert 512 < limited.context < 4096
    assert limited.warnings == (f"there is memory for {limited.context} tokens of context, and the model reads 4096",)


def test_loaded_bytes_are_those_of_the_model(tmp_path):
    source = tiny.make(tmp_path / "model")
    for name, grid in {"int4": "int4-g64", "q.gguf": "Q4_0"}.items():
        halfbyte.quantize(source, tmp_path / name, method="nearest", grid=grid)
    for path in (source, tmp_path / "int4", tmp_path / "q.gguf"):
        checkpoint = Checkpoint.open(path)
        model = nn.built(checkpoint, torch.bfloat16, torch.device("cpu"))
        held = {
            id(t): t.nbytes
            for m in model.modules()
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        }
        assert sum(held.values()) == pytest.approx(nn.loaded_bytes(checkpoint, torch.bfloat16), rel=0.02)


@pytest.mark.parametrize("kind", ["encoder", "no-tokenizer", "no-head"])
def test_what_answers_nothing(tmp_path, kind):
    folder = tiny.make(tmp_path / "model")
    if kind == "no-tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "encoder":
        config = transformers.BertConfig(
            vocab_size=264, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    else:
        transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    said = {"encoder": "is no decoder", "no-tokenizer": "tokenizer", "no-head": "predicts no tokens"}[kind]
    with pytest.raises((BadRequest, BadCheckpoint), match=said):
        Answering.open(folder, device="cpu")


def test_chats_go_through_the_template(tmp_path):
    chat = tiny.make(tmp_path / "chat", chat=True)
    opened = Answering.open(chat, device="cpu")
    messages = [{"role": "user", "content": "hi"}]
    assert opened.tokenizer.decode(opened.render(messages)) == "<user>hi"
    plain = Answering.open(tiny.make(tmp_path / "plain"), device="cpu")
    with pytest.raises(BadRequest, match="has no chat template"):
        plain.render(messages)


@pytest.mark.parametrize(
    "grid", ["int4-g128", *(pytest.param(grid, marks=pytest.mark.slow) for grid in ("nf4", "nvfp4", "Q4_K_M", "Q4_0"))]
)
def test_packed_weights_answer_what_decoded_ones_do(tmp_path, grid):
    """In float32, where neither rounds what the other does not, for 128 tokens."""
    out = tmp_path / ("q.gguf" if grid.startswith("Q") else "out")
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid=grid)
    checkpoint = Checkpoint.open(out)
    packed, decoded = (nn.built(checkpoint, torch.float32, torch.device("cpu")) for _ in range(2))
    multiplying.multiply_packed(packed, "exact")
    multiplying.unpack(decoded)
    assert any(isinstance(module, multiplying.PanelLinear) for module in packed.modules())
    assert not any(isinstance(module, multiplying.PanelLinear) for module in decoded.modules())
    opened = Answering.open(demo.MODEL, device="cpu")
    prompt, much = opened.encode(PROMPT), Sampling(max_tokens=128)
    answers = [tokens_of(Generation(replace(opened, model=model), prompt, much)) for model in (packed, decoded)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 128
