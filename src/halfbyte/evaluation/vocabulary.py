"""Whether models mean the same words by their tokens: predictions of different tokens cannot be compared, however alike
the numbers look."""

from pathlib import Path

from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.stamp import digest

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)


def difference(reference: Checkpoint, other: Checkpoint) -> str | None:
    """A token that is another in the other model, in words; None where there is none, or one of them has no
    tokenizer."""
    if (
        reference.path == other.path
        or not _has(reference)
        or not _has(other)
        or _files(reference) == _files(other) != {}
    ):
        return None
    vocabulary, others = _vocabulary(reference), _vocabulary(other)
    odd = next(
        (token for token in sorted(vocabulary.keys() & others.keys()) if vocabulary[token] != others[token]), None
    )
    return (
        None
        if odd is None
        else f"token {odd} is {others[odd][:40]!r} in {other.path} and {vocabulary[odd][:40]!r} in {reference.path}"
    )


def _has(checkpoint: Checkpoint) -> bool:
    return bool(_files(checkpoint) if checkpoint.vocabulary is None else checkpoint.vocabulary)


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.vocabulary is not None:
        return {}
    paths: list[Path] = [checkpoint.path / name for name in FILES]
    return {path.name: digest(path) for path in paths if path.is_file()}


def _vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Every token as it is written; some files have blanks in place of the signs for them in tokens that were added."""
    vocabulary = checkpoint.vocabulary
    if vocabulary is None:
        vocabulary = {token: word for word, token in calibrate.tokenizer_of(checkpoint).get_vocab().items()}
    return {token: word.replace("\u2581", " ") for token, word in vocabulary.items()}
