"""Text to windows of tokens, for calibration and for evaluation."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte import demo
from halfbyte.errors import BadRequest
from halfbyte.models.checkpoint import Checkpoint

DEFAULT = "default"
DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")


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
    whole = len(stream) // length
    warning = None
    if source == DEFAULT:
        warning = "the default calibration text is small and English; --calibration FILE takes text of the kind that the model will see"
    if whole >= samples:
        windows = stream[: whole * length].view(whole, length)[torch.randperm(whole, generator=generator)[:samples]]
    else:
        starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
        windows = torch.stack([stream[s : s + length] for s in starts])
        warning = f"the text fills {whole} windows of {length} tokens, so the {samples} asked for overlap; more text would be better"
    return Windows(windows, source, warning)


def evaluation(checkpoint: Checkpoint, source: str, length: int, limit: int | None) -> Windows:
    """Consecutive windows without overlap; what is left at the end is dropped."""
    stream = tokens(checkpoint, source, length)
    windows = stream[: len(stream) // length * length].view(-1, length)
    return Windows(windows[:limit] if limit else windows, source)


def tokens(checkpoint: Checkpoint, source: str, length: int) -> Int64[Tensor, " tokens"]:
    """All tokens of a source. Raises BadRequest for one that is empty, unreadable or shorter than one window."""
    tokenizer = _tokenizer(checkpoint)
    path = demo.CALIBRATION if source == DEFAULT else Path(source).expanduser()
    if path.suffix in (".jsonl", ".json") and path.is_file():
        texts = _json_lines(path, tokenizer)
    elif path.is_file():
        texts = [_text(path)]
    elif DATASET.fullmatch(source) and not path.exists():
        texts = _dataset(source, tokenizer)
    else:
        raise BadRequest(f"there is no calibration or text file {source}")
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=len(texts) > 1, verbose=False)["input_ids"])
    if len(ids) < length:
        what = "is empty" if not ids else f"has {len(ids)} tokens, fewer than one window of {length}"
        raise BadRequest(f"{source} {what}; give more text or a smaller --length")
    return torch.tensor(ids)


def bos(checkpoint: Checkpoint) -> int | None:
    """The token that the model's tokenizer puts before a text, if it puts one."""
    tokenizer = _tokenizer(checkpoint)
    first = tokenizer("a")["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def _tokenizer(checkpoint: Checkpoint):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise BadRequest(f"{checkpoint.path} has no tokenizer that Transformers can load ({str(error).strip().splitlines()[0]})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text: {error}") from None


def _json_lines(path: Path, tokenizer) -> list[str]:
    texts = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                texts.append(_record(json.loads(line), tokenizer))
            except (ValueError, KeyError, TypeError) as error:
                raise BadRequest(f"{path}, line {number}: {error}; each line is a JSON object with 'text' or 'messages', or a list of messages") from None
    return texts


def _record(record, tokenizer) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, list):
        return tokenizer.apply_chat_template(record, tokenize=False)
    if "messages" in record:
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    if isinstance(record.get("text"), str):
        return record["text"]
    raise ValueError("neither 'text' nor 'messages'")


def _dataset(source: str, tokenizer) -> list[str]:
    """`org/name` or `org/name:split` on the hub; its records have 'text' or 'messages'."""
    try:
        import datasets
    except ImportError:
        raise BadRequest(f"{source} is no file; to read it as a dataset of the hub: pip install 'halfbyte[datasets]'") from None
    name, _, split = source.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train")
        return [_record(r, tokenizer) for r in records]
    except (OSError, ValueError, KeyError) as error:
        raise BadRequest(f"dataset {source} cannot be read: {str(error).strip().splitlines()[0]}") from None
