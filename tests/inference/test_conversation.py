"""Turns of a chat: each is what the whole chat would be answered, and reads what is new alone."""

import json
from dataclasses import replace

import pytest

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import BadRequest
from halfbyte.inference.conversation import Conversation, parts_at
from halfbyte.inference.generation import Generation
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}<bos><{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos><assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FEW = Sampling(max_tokens=6)


def with_template(folder, template: str):
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def chatting(tmp_path_factory) -> Answering:
    folder = with_template(tiny.make(tmp_path_factory.mktemp("chat") / "model"), TEMPLATE)
    return Answering.open(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def bookworm() -> Answering:
    return Answering.open(demo.MODEL, device="cpu", dtype="float32")


def test_turns_are_those_of_the_whole_chat_read_anew(chatting):
    conversation = Conversation(chatting, system="be brief")
    messages, read = [{"role": "system", "content": "be brief"}], 0
    for question in ("who boils?", "what of wax?", "and jugs?"):
        messages.append({"role": "user", "content": question})
        turn = conversation.ask(question, FEW)
        assert "".join(piece.text for piece in turn) == turn.text
        anew = Generation(chatting, chatting.render(messages), FEW)
        assert [token for piece in anew for token in piece.tokens] == turn.tokens
        assert turn.generation.prompt_tokens == anew.prompt_tokens
        read += turn.generation.prompt_tokens - turn.generation.reused_tokens
        messages.append({"role": "assistant", "content": turn.text})
    assert turn.generation.reused_tokens > 40
    assert (conversation.tally.prompt_tokens, conversation.tally.completion_tokens) == (read, 18)
    assert conversation.tally.decode_rate > 0
    conversation.reset()
    again = conversation.ask("who boils?", FEW)
    assert again.generation.reused_tokens == 0
    assert conversation.tally.completion_tokens == 18
    next(again)
    assert conversation.tally.completion_tokens == 19


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(chatting):
    conversation = Conversation(chatting)
    turn = conversation.ask("who boils?", FEW)
    next(turn), next(turn)
    following = conversation.ask("go on", FEW)
    whole = [
        {"role": "user", "content": "who boils?"},
        {"role": "assistant", "content": turn.text},
        {"role": "user", "content": "go on"},
    ]
    assert following.generation.prompt_tokens == len(chatting.render(whole))


def test_texts_go_on_where_there_is_no_template(bookworm):
    conversation = Conversation(bookworm)
    first = conversation.ask("It was a dark night, and", FEW)
    said = "".join(piece.text for piece in first)
    second = conversation.ask("The old house", FEW)
    assert second.generation.reused_tokens == first.generation.prompt_tokens + 5  # the last token was not read yet
    whole = (
        bookworm.encode("It was a dark night, and") + first.tokens + bookworm.encode("\nThe old house", begins=False)
    )
    anew = Generation(bookworm, whole, FEW)
    assert "".join(piece.text for piece in second) == "".join(piece.text for piece in anew)
    assert said
    with pytest.raises(BadRequest, match="no place for a system message"):
        Conversation(bookworm, system="be brief")


def test_what_cannot_be_asked_changes_nothing(chatting):
    conversation = Conversation(replace(chatting, context=60))
    list(conversation.ask("who?", FEW))
    with pytest.raises(BadRequest, match="the context has 60"):
        conversation.ask("a lazy dog " * 9, FEW)
    assert conversation.ask("and?", FEW).generation.prompt_tokens < 60


def test_a_template_that_takes_no_system_message_says_so_at_once(tmp_path):
    folder = with_template(tiny.make(tmp_path / "model"), NO_SYSTEM + TEMPLATE)
    opened = Answering.open(folder, device="cpu")
    with pytest.raises(BadRequest, match="does not take this chat: System role not supported"):
        Conversation(opened, system="be brief")
    assert list(Conversation(opened).ask("who?", FEW))


def test_the_end_of_a_turn_is_known_by_the_template(tmp_path):
    """Where no file names the token that ends an answer."""
    folder = tiny.make(tmp_path / "model", eos_token_id=None)
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    assert Answering.open(folder, device="cpu").ends == frozenset()
    with_template(folder, TEMPLATE)
    assert Answering.open(folder, device="cpu").ends == {257}
    assert Answering.open(folder, device="cpu", raw=True).ends == frozenset()


def test_thoughts_are_known(chatting):
    turn = Conversation(chatting).ask("who?", Sampling(max_tokens=1))
    assert not turn.thinks
    turn._before = "<assistant> <think>"
    assert turn.thinks
    turn._answer["content"] = "hm </think> I"
    assert not turn.thinks
    turn._answer["content"] += "<think>"
    assert turn.thinks


def test_where_answers_part():
    assert parts_at([1, 2, 3], [1, 2, 3]) is None
    assert parts_at([1, 2, 3], [1, 2]) is None
    assert parts_at([1, 2, 3], [1, 4, 3]) == 1


@pytest.mark.parametrize(
    ("said", "asked", "means"),
    [
        ({}, {}, {"temperature": 0}),
        ({}, {"top_p": 0.5}, {"temperature": 1, "top_p": 0.5}),
        ({"temperature": 0.6, "top_k": 20}, {}, {"temperature": 0, "top_k": 0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"top_k": 5}, {"temperature": 0.6, "top_k": 5}),
        ({"do_sample": True}, {}, {"temperature": 1}),
        ({"repetition_penalty": 1.1}, {}, {"temperature": 0, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, {"temperature": 0}),
    ],
)
def test_tokens_are_drawn_as_the_makers_say_unless_somebody_says_otherwise(tmp_path, said, asked, means):
    folder = tiny.make(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(said))
    found = Answering.open(folder, device="cpu").sampling(asked)
    assert {name: found[name] for name in means} == means


def test_makers_who_say_what_cannot_be(tmp_path):
    folder = tiny.make(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": "hot"}))
    with pytest.raises(halfbyte.HalfbyteError, match=r"how .*model generates cannot be: temperature"):
        Answering.open(folder, device="cpu").sampling({})


def test_a_gguf_says_how_tokens_are_drawn(tmp_path):
    """Of what llama.cpp's converter writes there."""
    import gguf

    source, path = tiny.make(tmp_path / "model"), tmp_path / "q.gguf"
    halfbyte.quantize(source, path, method="nearest", grid="Q8_0")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "drawn.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")) and field.contents() != []:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 64)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Answering.open(tmp_path / "drawn.gguf", device="cpu").sampling({})
    assert (found.temperature, found.top_k) == (0.5, 64)
    assert Answering.open(path, device="cpu").sampling({}).temperature == 0
