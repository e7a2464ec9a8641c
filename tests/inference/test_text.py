"""Text as it comes: whole characters, and never a part of what ends an answer."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

import tiny
from halfbyte import demo
from halfbyte.inference.text import TextStream
from halfbyte.models import tokenizers

TEXT = "naïve 猫 🐈‍⬛ and ascii — ✓\n"


class Decoding:
    """A tokenizer of the tokenizers package, asked as Transformers' are."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def pieces(stream: TextStream, tokens) -> list[str]:
    said = []
    for token in tokens:
        said.append(stream.add(token))
        if stream.stopped:
            return said
    return [*said, stream.end()]


@pytest.fixture(scope="module", params=["bytes", "bookworm"])
def tokenizer(request):
    return Decoding(tiny.tokenizer(adds_bos=False)) if request.param == "bytes" else tokenizers.load(demo.MODEL)


def encoded(tokenizer, text: str) -> list[int]:
    inner = tokenizer.tokenizer if isinstance(tokenizer, Decoding) else tokenizer.backend_tokenizer
    return inner.encode(text, add_special_tokens=False).ids


def test_characters_come_whole(tokenizer):
    tokens = encoded(tokenizer, TEXT)
    assert len(tokens) > len(TEXT)
    said = pieces(TextStream(tokenizer, ()), tokens)
    assert "".join(said) == TEXT
    assert not any("\ufffd" in piece for piece in said)


def test_what_never_becomes_a_character_is_said_at_the_end(tokenizer):
    tokens = encoded(tokenizer, "so 猫")[:-1]
    assert "".join(pieces(TextStream(tokenizer, ()), tokens)) == tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_random_tokens_are_as_decoded_whole(tokenizer):
    draw = random.Random(0)
    for _ in range(40):
        tokens = [draw.randrange(250) for _ in range(30)]
        whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces(TextStream(tokenizer, ()), tokens)) == whole


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (("ascii",), "naïve 猫 🐈‍⬛ and "),
        (("✓", "d a"), "naïve 猫 🐈‍⬛ an"),
        (("猫 🐈",), "naïve "),
        (("nowhere", "✓\n\n"), TEXT),
        (("n",), ""),
    ],
)
def test_stop_strings_may_lie_across_tokens(tokenizer, stop, said):
    stream = TextStream(tokenizer, (), stop)
    found = pieces(stream, encoded(tokenizer, TEXT))
    assert "".join(found) == said
    assert stream.stopped == (said != TEXT)


def test_nothing_of_a_stop_string_is_said_before_it_is_known_to_be_none():
    tokenizer = Decoding(tiny.tokenizer(adds_bos=False))
    stream = TextStream(tokenizer, (), ("STOP",))

    def added(text: str) -> list[str]:
        return [stream.add(token) for token in encoded(tokenizer, text)]

    assert added("a STO") == ["a", " ", "", "", ""]
    assert added("X") == ["STOX"]
    assert added("SS") == ["", "S"]
    assert stream.end() == "S"


def test_words_begin_as_what_is_before_them_wants():
    """SentencePiece's tokenizers drop the space of a text's first word, and of no other."""
    vocabulary = {"▁Once": 0, "▁upon": 1, "▁a": 2, "!": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    inner.decoder = decoders.Metaspace()
    tokenizer = Decoding(inner)
    assert "".join(pieces(TextStream(tokenizer, [0]), [1, 2, 3])) == " upon a!"
    assert "".join(pieces(TextStream(tokenizer, ()), [0, 1])) == "Once upon"
