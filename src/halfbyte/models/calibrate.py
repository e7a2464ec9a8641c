"""Text to windows of tokens, for calibration and for evaluation."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from jinja2 import TemplateError
from torch import Tensor

from halfbyte import demo
from halfbyte.errors import BadCheckpoint, BadRequest
from halfbyte.models.checkpoint import Checkpoint

DEFAULT = "default"
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
EXPECTED = "a record is an object with 'text' or 'messages', a string, or a list of messages"
DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")


class Text(NamedTuple):
    text: str
    is_whole: bool
    """Whether the tokenizer's special tokens belong around it: a chat template has put them already, and a file is cut anyway."""


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, and what is to be said of where they come from."""

    tokens: Int64[Tensor, "windows length"]
    source: str
    warning: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens as 32-bit integers: two runs with the same digest saw the same calibration."""
        return hashlib.sha256(self.tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def calibration(checkpoint: Checkpoint, source: str, samples: int, length: int, seed: int) -> Windows:
    """`samples` windows drawn without overlap where the text is long enough, else at random."""
    stream = tokens(checkpoint, source, length)
    generator = torch.Generator().manual_seed(seed)
    whole, distinct = len(stream) // length, len(stream) - length + 1
    if samples > distinct:
        what = f"{source} has {len(stream)} tokens, from which {samples} windows of {length} cannot be drawn"
        raise BadRequest(f"{what}; give more text, or smaller --samples or --length")
    warning = None
    if source == DEFAULT:
        warning = "the default calibration text is small and English; --calibration FILE takes text of the kind that the model will see"
    if whole >= samples:
        windows = stream[: whole * length].view(whole, length)[torch.randperm(whole, generator=generator)[:samples]]
    else:
        starts = torch.randint(0, distinct, (samples,), generator=generator)
        windows = torch.stack([stream[s : s + length] for s in starts])
        warning = f"the text fills {whole} windows of {length} tokens, so the {samples} asked for overlap; more text would be better"
    return Windows(windows, source, warning)


def evaluation(checkpoint: Checkpoint, source: str, length: int, limit: int | None) -> Windows:
    """Consecutive windows without overlap; what is left at the end is dropped."""
    stream = tokens(checkpoint, source, length)
    windows = stream[: len(stream) // length * length].view(-1, length)
    return Windows(windows[:limit] if limit else windows, source)


def longest(checkpoint: Checkpoint, otherwise: int) -> int:
    """Tokens that the model reads at once; `otherwise` where its config does not say."""
    return next((n for key in POSITIONS if isinstance(n := checkpoint.text_config.get(key), int)), otherwise)


def tokens(checkpoint: Checkpoint, source: str, length: int) -> Int64[Tensor, " tokens"]:
    """All tokens of a source. Raises BadRequest for one that is empty, unreadable or shorter than one window."""
    if length > (most := longest(checkpoint, length)):
        raise BadRequest(f"the model reads at most {most} tokens at once, not {length}; give a smaller --length")
    tokenizer = tokenizer_of(checkpoint)
    path = demo.CALIBRATION if source == DEFAULT else Path(source).expanduser()
    if path.suffix in (".jsonl", ".json") and path.is_file():
        texts = _json_lines(path, tokenizer)
    elif path.is_file():
        texts = [Text(_read(path), False)]
    elif DATASET.fullmatch(source) and not path.exists():
        texts = _dataset(source, tokenizer)
    else:
        raise BadRequest(f"there is no text file '{source}'")
    ids: list[int] = []
    for text, is_whole in texts:
        ids.extend(tokenizer(text, add_special_tokens=is_whole, verbose=False)["input_ids"])
    if len(ids) < length:
        what = "is empty" if not ids else f"has {len(ids)} tokens, fewer than one window of {length}"
        raise BadRequest(f"{source} {what}; give more text or a smaller --length")
    vocabulary = checkpoint.text_config.get("vocab_size")
    if vocabulary and max(ids) >= vocabulary:
        raise BadCheckpoint(f"the tokenizer of {checkpoint.path} makes token {max(ids)}, but config.json says that there are {vocabulary}")
    return torch.tensor(ids)


def bos(checkpoint: Checkpoint) -> int | None:
    """The token that the model's tokenizer puts before a text, if it puts one."""
    tokenizer = tokenizer_of(checkpoint)
    first = tokenizer("a")["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def tokenizer_of(checkpoint: Checkpoint):
    from halfbyte.models import skeleton

    try:
        return checkpoint.tokenizer()
    except skeleton.REFUSALS as error:
        raise BadRequest(f"Transformers cannot load the tokenizer of {checkpoint.path}: {' '.join(str(error).split())}") from None


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise BadRequest(f"{path} is not text: it holds NUL bytes")
    return text


def _json_lines(path: Path, tokenizer) -> list[Text]:
    text = _read(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):  # one list instead of a record per line
        try:
            records = json.loads(text)
        except ValueError as error:
            raise BadRequest(f"{path} is not JSON: {error}") from None
        return [_record(record, tokenizer, f"{path}, record {number}") for number, record in enumerate(records, 1)]
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold other kinds of line ends
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise BadRequest(f"{path}, line {number}: {error}; {EXPECTED}") from None
            texts.append(_record(record, tokenizer, f"{path}, line {number}"))
    return texts


def _record(record, tokenizer, place: str) -> Text:
    if isinstance(record, dict):
        record = record["messages"] if "messages" in record else record.get("text")
    if isinstance(record, str):
        return Text(record, True)
    if not isinstance(record, list) or not all(isinstance(message, dict) for message in record):
        raise BadRequest(f"{place}: {EXPECTED}")
    if not tokenizer.chat_template:
        raise BadRequest(f"{place}: the model's tokenizer has no chat template to make text of a chat; give records with 'text'")
    try:
        return Text(tokenizer.apply_chat_template(record, tokenize=False), False)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRequest(f"{place}: the chat template does not take it: {' '.join(str(error).split())}") from None


def _dataset(source: str, tokenizer) -> list[Text]:
    """`org/name` or `org/name:split` on the hub; its records have 'text' or 'messages'."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise BadRequest(f"there is no text file '{source}'; to look for it on the hub as a dataset: pip install 'halfbyte[datasets]'") from None
    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise BadRequest(f"dataset {source} cannot be read: {' '.join(str(error).split())}") from None
    return [_record(record, tokenizer, f"{source}, record {number}") for number, record in enumerate(records, 1)]
