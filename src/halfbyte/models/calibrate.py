"""Text to windows of tokens, for calibration and for evaluation: each begins as a text begins where the model is
served."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte import demo
from halfbyte.errors import BadCheckpoint, BadRequest, plural
from halfbyte.models import chats, texts
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.texts import Record
from halfbyte.recipe import Calibration

DEFAULT = "default"
Begin = Literal["before", "over", "none"]
"""Where what the tokenizer puts before a text goes: before the text of each window, over its first tokens, or
nowhere."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a source, one text after the other."""

    tokens: Int64[Tensor, " tokens"]
    opening: tuple[int, ...] = ()
    """What every text begins with where the model is served, and so every window."""
    opening_words: tuple[str, ...] = ()
    of_chats: bool = False
    """As the model's template puts them."""
    warnings: tuple[str, ...] = ()

    def window(self, start: int, length: int) -> Int64[Tensor, " length"]:
        """The opening and what follows from `start` on; a text that begins there brings its own."""
        opening = torch.tensor(self.opening, dtype=self.tokens.dtype)
        if torch.equal(self.tokens[start : start + len(opening)], opening):
            return self.tokens[start : start + length]
        return torch.cat([opening, self.tokens[start : start + length - len(opening)]])

    def consecutive(self, length: int, limit: int | None = None) -> Int64[Tensor, "samples length"]:
        """Windows without overlap, at most `limit`; what is left at the end is dropped."""
        windows, at = [], 0
        while len(windows) != limit and len(window := self.window(at, length)) == length:
            windows.append(window)
            at += length if torch.equal(window, self.tokens[at : at + length]) else length - len(self.opening)
        return torch.stack(windows) if windows else self.tokens.new_empty(0, length)

    def starts(self, length: int) -> int:
        """At how many places a window may begin."""
        return max(0, len(self.tokens) - length + 1)


@dataclass(frozen=True)
class Samples:
    """Samples of equal length, and what is to be said of where they come from."""

    tokens: Int64[Tensor, "samples length"]
    source: str
    stream: TokenStream
    chats: int = 0
    """How many of them are of chats."""
    warnings: tuple[str, ...] = ()
    spoken: TokenStream | None = None
    """Where those of chats come from, if not from the same source."""

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens as 32-bit integers: two runs with the same digest saw the same calibration."""
        return hashlib.sha256(self.tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """For the report."""
        return {
            "source": self.source,
            "windows": list(self.tokens.shape),
            "opening": list(self.stream.opening_words),
            "chats": self.chats,
            "chat_opening": list((self.spoken or self.stream).opening_words) if self.chats else None,
            "tokens_sha256": self.digest,
        }


def calibration(checkpoint: Checkpoint, asked: Calibration) -> Samples:
    """`asked.samples` windows drawn without overlap where the text is long enough, else at random.

    Some of the default text are chats for a model that chats.
    """
    source, count, length = asked.source, asked.samples, asked.length
    generator, tokenizer = torch.Generator().manual_seed(asked.seed), tokenizer_of(checkpoint)
    if isinstance(source, tuple) or source != DEFAULT:
        stream = read(checkpoint, tokenizer, source, length)
        tokens, warnings = _drawn(stream, texts.called(source), count, length, generator)
        return Samples(
            tokens, texts.called(source), stream, len(tokens) * stream.of_chats, (*stream.warnings, *warnings)
        )
    stream = read(checkpoint, tokenizer, str(demo.CALIBRATION), length)
    spoken, talks, warnings = _default_chats(checkpoint, tokenizer, count // 2, length)
    tokens, more = _drawn(stream, source, count - len(talks), length, generator)
    kind = "small and mostly English" if len(talks) else "small and English"
    warning = (
        f"the default calibration text is {kind}; --calibration FILE takes text of the kind that the model will see"
    )
    return Samples(torch.cat([tokens, talks]), source, stream, len(talks), (*(more or (warning,)), *warnings), spoken)


def evaluation(checkpoint: Checkpoint, source: str, length: int, limit: int | None, begin: Begin = "before") -> Samples:
    """Consecutive windows without overlap; what is left at the end is dropped."""
    stream = read(checkpoint, tokenizer_of(checkpoint), source, length)
    if begin == "none":
        stream = replace(stream, opening=(), opening_words=())
    tokens = (stream if begin == "before" else replace(stream, opening=())).consecutive(length, limit)
    if begin == "over":
        tokens[:, : len(stream.opening)] = torch.tensor(stream.opening, dtype=tokens.dtype)
    return Samples(tokens, source, stream, len(tokens) * stream.of_chats, stream.warnings)


def longest(checkpoint: Checkpoint, otherwise: int) -> int:
    """Tokens that the model reads at once; `otherwise` where its config does not say."""
    return next((n for key in POSITIONS if isinstance(n := checkpoint.text_config.get(key), int)), otherwise)


def read(checkpoint: Checkpoint, tokenizer: Any, source: str | tuple[str, ...], length: int) -> TokenStream:
    """All tokens of a source. Raises BadRequest for one that is empty, unreadable or shorter than one window."""
    if length > (most := longest(checkpoint, length)):
        raise BadRequest(f"the model reads at most {most} tokens at once, not {length}; give a smaller --length")
    stream = _stream(checkpoint, tokenizer, texts.records(source))
    if not stream.starts(length):
        count = len(stream.tokens)
        what = f"has {plural(count, 'token')}, fewer than one window of {length}" if count else "is empty"
        raise BadRequest(f"{texts.called(source)}: the text {what}; give more text or a smaller --length")
    return stream


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text."""
    whole, bare = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    return tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)])


def tokenizer_of(checkpoint: Checkpoint):
    """The checkpoint's tokenizer. Raises BadRequest where Transformers cannot load it."""
    from halfbyte.models import skeleton

    try:
        return checkpoint.tokenizer()
    except skeleton.REFUSALS as error:
        raise BadRequest(
            f"Transformers cannot load the tokenizer of {checkpoint.path}: {' '.join(str(error).split())}"
        ) from None


def _stream(checkpoint: Checkpoint, tokenizer: Any, records: Sequence[Record]) -> TokenStream:
    """Records to tokens: chats through the model's template, which puts its special tokens itself."""
    has_template = chats.template_of(tokenizer) is not None
    if untold := next((record for record in records if record.text is None and not has_template), None):
        raise BadRequest(
            f"{untold.location}: the model's tokenizer has no chat template to make text of a chat; give "
            "records with 'text'"
        )
    talks = [record for record in records if record.messages is not None and has_template]
    rendered, warnings = _rendered(tokenizer, talks)
    begins = opening(tokenizer)
    if (
        not begins
        and talks
        and tokenizer.bos_token
        and next(text for text in rendered if text is not None).startswith(tokenizer.bos_token)
    ):
        begins = (tokenizer.bos_token_id,)
    spoken = iter(rendered)
    ids: list[int] = []
    for record in records:
        is_chat = record.messages is not None and has_template
        text = next(spoken) if is_chat else record.text
        if text is not None:
            ids.extend(tokenizer(text, add_special_tokens=record.is_whole and not is_chat, verbose=False)["input_ids"])
    vocabulary = checkpoint.text_config.get("vocab_size")
    if vocabulary and ids and max(ids) >= vocabulary:
        raise BadCheckpoint(
            f"the tokenizer of {checkpoint.path} makes token {max(ids)}, but config.json says that there are "
            f"{vocabulary}"
        )
    opening_tokens = tuple(tokenizer.convert_ids_to_tokens(list(begins)))
    return TokenStream(
        torch.tensor(ids, dtype=torch.int64), begins, opening_tokens, len(talks) == len(records), warnings
    )


def _rendered(tokenizer: Any, talks: Sequence[Record]) -> tuple[list[str | None], tuple[str, ...]]:
    """Chats as text, without those that the template does not take. Raises BadRequest if it takes none."""
    if not talks:
        return [], ()
    rendered, refused = chats.render(tokenizer, [record.messages or [] for record in talks])
    reasons = [f"{talks[number].location}: the chat template does not take it: {reason}" for number, reason in refused]
    if len(refused) == len(talks):
        raise BadRequest(reasons[0])
    rendered = [
        text if text is None else texts.sound(text, record.location)
        for text, record in zip(rendered, talks, strict=True)
    ]
    return rendered, (f"left out: {len(refused)} of {plural(len(talks), 'chat')}; {reasons[0]}",) if refused else ()


def _drawn(
    stream: TokenStream, source: str, count: int, length: int, generator: torch.Generator
) -> tuple[Int64[Tensor, "samples length"], tuple[str, ...]]:
    """Windows without overlap where there are enough, else windows that begin anywhere."""
    if count > (distinct := stream.starts(length)):
        what = (
            f"{source} has {plural(len(stream.tokens), 'token')}, from which {plural(count, 'window')} of {length} "
            "cannot be drawn"
        )
        raise BadRequest(f"{what}; give more text, or smaller --samples or --length")
    whole = stream.consecutive(length)
    if len(whole) >= count:
        return whole[torch.randperm(len(whole), generator=generator)[:count]], ()
    starts = torch.randint(0, distinct, (count,), generator=generator)
    warning = (
        f"the text fills {plural(len(whole), 'window')} of {length} tokens, so the {count} asked for overlap; "
        "more text would be better"
    )
    return torch.stack([stream.window(int(start), length) for start in starts]), (warning,)


def _default_chats(
    checkpoint: Checkpoint, tokenizer: Any, count: int, length: int
) -> tuple[TokenStream | None, Tensor, tuple[str, ...]]:
    """Windows of the embedded chats, at most `count`; none for a model without a chat template."""
    none = torch.empty(0, length, dtype=torch.int64)
    if chats.template_of(tokenizer) is None:
        return None, none, ()
    try:
        stream = _stream(checkpoint, tokenizer, texts.records(demo.CHATS))
    except (BadRequest, BadCheckpoint) as error:  # a user who asked for no chats need not mend a template
        reason = str(error).replace(str(demo.CHATS), "the embedded ones")  # where the package lies is nobody's business
        return None, none, (f"calibrated without chats: {reason}",)
    return stream, stream.consecutive(length, count), stream.warnings
