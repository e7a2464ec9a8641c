"""The server by OpenAI's own client, over a real port: what it answers, whom it refuses, and whom it lets wait."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from halfbyte import demo
from halfbyte.errors import BadRequest
from halfbyte.inference.generation import Generation
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.server.listen import Server, Serving
from halfbyte.inference.server.port import listener, url
from halfbyte.inference.server.scheduler import Job, Scheduler
from halfbyte.models import chats

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools were called') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
PROMPT = "The old man looked at the sea and"
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who is there?"}]
GREEDY = {"model": "bookworm", "temperature": 0}


def opened(template: str | None) -> Answering:
    answering = Answering.open(demo.MODEL, device="cpu", dtype="float32")
    answering.tokenizer.chat_template = template
    return replace(answering, template=template, renderer=chats.Renderer(answering.tokenizer))


@pytest.fixture(scope="module")
def bookworm() -> Answering:
    return opened(TEMPLATE)


class Started:
    """A server in a thread of its own."""

    def __init__(self, server: Server, base: str, lines: list[str]):
        self.server, self.base, self.lines = server, base, lines
        self.client = OpenAI(base_url=f"{base}/v1", api_key="secret", max_retries=0, timeout=60)

    @property
    def running(self) -> int:
        return self.server._scheduler.running

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> float:
        """How long it takes until something is so."""
        began = time.perf_counter()
        while not holds():
            assert time.perf_counter() - began < seconds
            time.sleep(0.002)
        return time.perf_counter() - began


@contextmanager
def started(answering: Answering, **asked) -> Iterator[Started]:
    lines: list[str] = []
    at = listener("127.0.0.1", 0)
    server = Server(answering, Serving("bookworm", lines.append, **{"key": None, "slots": 4, "queue": 64, **asked}))
    thread = threading.Thread(target=server.answer, args=(at,))
    base = url(at)
    thread.start()
    made = Started(server, base, lines)
    try:
        made.until(lambda: bool(lines))
        yield made
    finally:
        server.end()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(bookworm) -> Iterator[Started]:
    with started(bookworm) as made:
        yield made


def greedy(answering: Answering, tokens: list[int], count: int) -> list[int]:
    """By Transformers."""
    ids = torch.tensor([tokens])
    found = answering.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return found[0, len(tokens) :].tolist()


def test_answers_are_those_of_transformers(bookworm, served):
    tokens = greedy(bookworm, bookworm.encode(PROMPT), 24)
    answer = served.client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY)
    assert answer.choices[0].text == bookworm.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == len(tokens) == 24
    assert answer.usage.prompt_tokens == len(bookworm.encode(PROMPT))
    by_number = served.client.completions.create(prompt=bookworm.encode(PROMPT), max_tokens=24, **GREEDY)
    assert by_number.choices[0].text == answer.choices[0].text
    chat = served.client.chat.completions.create(messages=CHAT, max_completion_tokens=16, **GREEDY)
    tokens = greedy(bookworm, bookworm.render(CHAT), 16)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == bookworm.tokenizer.decode(tokens, skip_special_tokens=True)
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + 16


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 5, "top_p": 0.9}])
def test_a_stream_says_the_same_as_a_whole_answer(served, sampling):
    asked = {"model": "bookworm", "max_tokens": 20, "logprobs": 2, "prompt": PROMPT, **sampling}
    whole = served.client.completions.create(**asked)
    pieces = list(served.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == whole.choices[0].finish_reason
    assert all(piece.usage is None for piece in pieces[:-1])
    assert (pieces[-1].choices, pieces[-1].usage) == ([], whole.usage)
    columns = [piece.choices[0].logprobs for piece in pieces[:-1] if piece.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in columns for value in getattr(part, name)] == getattr(whole.choices[0].logprobs, name)


def test_a_stream_of_a_chat_says_the_same(served):
    asked = {**GREEDY, "messages": CHAT, "max_tokens": 12, "logprobs": True, "top_logprobs": 1}
    whole = served.client.chat.completions.create(**asked).choices[0]
    pieces = [piece.choices[0] for piece in served.client.chat.completions.create(**asked, stream=True)]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason
    tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
    assert tokens == whole.logprobs.content


def test_a_seed_repeats_and_another_does_not(served):
    def drawn(seed):
        return served.client.completions.create(
            model="bookworm", prompt=PROMPT, max_tokens=24, temperature=1, seed=seed
        ).choices[0]

    with ThreadPoolExecutor(4) as pool:  # whoever takes turns with whom
        first, again, other, unseeded = pool.map(drawn, (3, 3, 4, None))
    assert first == again
    assert len({first.text, other.text, unseeded.text}) == 3


def test_a_text_ends_before_a_stop(served):
    whole = served.client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY).choices[0].text
    for stop in (whole[10:14], [whole[20:22], "nowhere", whole[12:15]]):
        for stream in (False, True):
            answer = served.client.completions.create(prompt=PROMPT, max_tokens=24, stop=stop, stream=stream, **GREEDY)
            pieces = list(answer) if stream else [answer]
            first = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
            assert "".join(piece.choices[0].text for piece in pieces) == whole[:first]
            assert pieces[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(bookworm, served):
    answer = served.client.chat.completions.create(messages=CHAT, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY)
    prompt = bookworm.render(CHAT)
    tokens = greedy(bookworm, prompt, 8)
    with torch.inference_mode():
        logits = bookworm.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = logits.log_softmax(-1)
    said = answer.choices[0].logprobs.content
    assert len(said) == 8
    for row, token, of in zip(logprobs, tokens, said, strict=True):
        assert of.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [likely.logprob for likely in of.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert of.top_logprobs[0].token == of.token
    assert "".join(of.token for of in said) == answer.choices[0].message.content
    assert b"".join(bytes(of.bytes) for of in said).decode() == answer.choices[0].message.content


def test_tokens_of_a_part_of_a_character_have_their_bytes(bookworm, served):
    text = "näïve 😀"
    tokens = bookworm.tokenizer(text, add_special_tokens=False)["input_ids"]
    names = served.server.config.app.routes[0].endpoint.__self__.names
    assert b"".join(bytes(names._named(token, 0.0)["bytes"]) for token in tokens).decode() == text


def test_models_and_health(served):
    (model,) = served.client.models.list().data
    assert (model.id, model.owned_by) == ("bookworm", "halfbyte")
    assert served.client.models.retrieve("bookworm").id == "bookworm"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this is bookworm"):
        served.client.models.retrieve("gpt-4")
    assert get(served, "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})


def get(served: Started, path: str) -> tuple[int, dict]:
    answer = served.client._client.get(served.base + path)
    return answer.status_code, answer.json()


def post(served: Started, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    given = {"content-type": "application/json", **headers}
    answer = served.client._client.post(served.base + path, content=body, headers=given)
    return answer.status_code, answer.json()["error"]


BAD_CHATS = [
    ({"messages": []}, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "'system', 'developer', 'user'"),
    ({"messages": [{"role": "user"}]}, "a message has content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type 'text'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "no tools were called"),
    ({"messages": CHAT, "temperature": "1"}, "temperature: input should be a valid number"),
    ({"messages": CHAT, "temperature": 3}, "less than or equal to 2"),
    ({"messages": CHAT, "top_p": 0}, "top_p"),
    ({"messages": CHAT, "n": 2}, "n: one answer"),
    ({"messages": CHAT, "presence_penalty": 0.5}, "repetition_penalty in its place"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": CHAT, "max_tokns": 3}, "max_tokns is not known here"),
    ({"messages": CHAT, "top_logprobs": 2}, "give logprobs: true too"),
    ({"messages": CHAT, "stream_options": {"include_usage": True}}, "give stream: true too"),
    ({"messages": CHAT, "stop": ""}, "stop: a text"),
    ({"messages": CHAT, "seed": -1}, "seed"),
    ({"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, "takes no tools"),
    ({"messages": CHAT, "tool_choice": "required"}, "auto and none are known"),
    ({"messages": CHAT, "max_tokens": 100_000}, "max_tokens of "),
    ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "the prompt has"),
]


@pytest.mark.parametrize(("words", "said"), BAD_CHATS, ids=[said for _, said in BAD_CHATS])
def test_bad_chats_are_refused_with_a_reason(served, words, said):
    for stream in (False, True):
        asked = {"stream": stream} if "stream_options" not in words else {}
        status, error = post(served, json.dumps({**words, **asked}).encode(), "/v1/chat/completions")
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert said in error["message"]
        assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "is not JSON"),
        (b"\xff\xfe", 400, "is not JSON"),
        (b"[1]", 400, "has to be a JSON object"),
        (b'{"a":' * 5000, 400, "is not JSON"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, "nests deeper"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature: input should be"),
        (b'{"prompt": "\\ud800"}', 400, "is not JSON"),
        (b'{"prompt": ["a", "b"]}', 400, "one prompt"),
        (b'{"prompt": [1, -1]}', 400, "has token -1"),
        (b'{"prompt": [1000000000000000000000000]}', 400, "has token"),
        (b'{"prompt": []}', 400, "the prompt is empty"),
        (b'{"prompt": {}}', 400, "a text, or a list of tokens"),
        (b'{"prompt": "a", "echo": true}', 400, "echo: the prompt is not repeated"),
        (b'{"prompt": "a", "logprobs": 1000}', 400, "less than or equal to 20"),
        (b'{"prompt": "a", "model": "gpt-4"}', 404, "there is no model 'gpt-4'"),
        (b'{"prompt": "' + b"a" * (2 << 20) + b'"}', 413, "more than"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_with_a_reason(served, body, status, said):
    found, error = post(served, body)
    assert found == status
    assert said in error["message"]


def test_paths_methods_and_types_that_are_none(served):
    assert get(served, "/v2")[0] == 404
    assert get(served, "/v1/completions")[0] == 405
    assert post(served, b"prompt=a", **{"content-type": "text/plain"})[0] == 415
    assert "access-control-allow-origin" not in served.client._client.get(f"{served.base}/v1/models").headers
    code = post(served, json.dumps({"prompt": PROMPT, "max_tokens": 1 << 20}).encode())[1]["code"]
    assert code == "context_length_exceeded"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WORDS = (
    "messages",
    "prompt",
    "stop",
    "seed",
    "stream",
    "logprobs",
    "top_logprobs",
    "tools",
    "n",
    "temperature",
    "model",
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words=st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=4), chat=st.booleans())
def test_whatever_comes_is_answered_or_refused(served, words, chat):
    given = {**words, "max_tokens": 1}
    given |= {"messages": [{"role": "user", "content": words["messages"]}]} if "messages" in words else {}
    answer = served.client._client.post(
        f"{served.base}/v1/{'chat/' if chat else ''}completions",
        content=json.dumps(given).encode(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def hang_up(served: Started, stream: bool) -> socket.socket:
    """A client of an answer that takes long, which has its slot."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": stream}).encode()
    host, _, port = served.base.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(f"{head}\r\n\r\n".encode() + body)
    served.until(lambda: served.running > 0)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_gives_back_the_slot(bookworm, stream):
    with started(bookworm, slots=1, queue=1) as alone:
        client = hang_up(alone, stream)
        with (
            hang_up_waiting(alone),
            pytest.raises(openai.InternalServerError, match="wait, which is all") as refused,
        ):
            alone.client.completions.create(prompt=PROMPT, max_tokens=1, **GREEDY)
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        client.close()
        assert alone.until(lambda: alone.running == 0) < 2
        assert any("499" in line and "hung up" in line for line in alone.lines)
        assert alone.client.completions.create(prompt=PROMPT, max_tokens=2, **GREEDY).usage.completion_tokens == 2


@contextmanager
def hang_up_waiting(served: Started) -> Iterator[None]:
    """Inside, somebody waits in the queue, who then hangs up as well."""
    client = hang_up(served, stream=False)
    served.until(lambda: served.server._scheduler.waiting == 1)
    yield
    client.close()


@pytest.mark.slow
def test_64_clients_at_once_lose_nothing(bookworm, served):
    prompts = [f"{PROMPT} {number}" for number in range(64)]

    def asked(prompt: str) -> str:
        stream = prompt.endswith(("1", "3", "5"))
        answer = served.client.completions.create(prompt=prompt, max_tokens=6, stream=stream, **GREEDY)
        pieces = answer if stream else [answer]
        return "".join(piece.choices[0].text for piece in pieces)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(asked, prompts))
    wanted = [
        "".join(piece.text for piece in Generation(bookworm, bookworm.encode(prompt), Sampling(max_tokens=6)))
        for prompt in prompts
    ]
    assert answers == wanted


def test_turns_are_fair(bookworm):
    """A short answer does not wait for a long one, where there is a slot."""
    ended: list[str] = []
    scheduler = Scheduler(bookworm, slots=2, queue=8)

    def job(name: str, tokens: int) -> Job:
        def tell(event) -> None:
            if type(event).__name__ == "Done":
                ended.append(name)

        return Job(lambda: bookworm.encode(PROMPT), Sampling(max_tokens=tokens), tell)

    for name, tokens in (("long", 40), ("short", 5), ("second", 5), ("third", 5)):
        scheduler.submit(job(name, tokens))
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    while len(ended) < 4:
        time.sleep(0.01)
    scheduler.stop()
    thread.join()
    assert ended == ["short", "second", "third", "long"]


def test_an_end_is_told_to_those_who_wait(bookworm):
    with started(bookworm, slots=1, queue=4) as ending, ThreadPoolExecutor(2) as pool:
        stream = ending.client.completions.create(prompt=PROMPT, max_tokens=400, stream=True, **GREEDY)
        next(stream)
        waiting = pool.submit(ending.client.completions.create, prompt=PROMPT, max_tokens=400, **GREEDY)
        ending.until(lambda: ending.server._scheduler.waiting == 1)
        ending.server.end()
        with pytest.raises(openai.APIError, match="shut down before the answer was whole"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="shut down before the answer was whole"):
            waiting.result()


def test_a_key_is_asked_for(bookworm):
    with started(bookworm, key="secret") as locked:
        assert locked.client.models.list().data
        for key in ("secre", "secrets", "ünï"):
            headers = {"authorization": f"Bearer {key}".encode()}
            assert locked.client._client.get(f"{locked.base}/v1/models", headers=headers).status_code == 401
            answer = locked.client._client.post(f"{locked.base}/v1/completions", content=b"", headers=headers)
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert get(locked, "/health")[0] == 200


def test_a_port_in_use_is_said():
    taken = listener("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(BadRequest, match=f"port {port} of 127.0.0.1 is in use; name another with --port"):
        listener("127.0.0.1", port)
    taken.close()
    with pytest.raises(BadRequest, match="no address"):
        listener("nowhere.invalid", 0)
