"""A tokenizer as Transformers reads it, out of files that anybody may have made."""

import json
from pathlib import Path
from typing import Any

from halfbyte.errors import BadCheckpoint
from halfbyte.files import exists, read_bytes, read_object

READ_WHOLE = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
OBJECTS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def load(folder: Path):
    """Raises BadCheckpoint for files that are none, too large or too deep, and for what the tokenizers package finds
    wrong."""
    import transformers

    for name in OBJECTS:
        read_object(folder / name)
    for name in READ_WHOLE:
        if exists(folder / name):
            read_bytes(folder / name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if type(error) is not Exception:  # which is all that the tokenizers package, written in Rust, ever raises
            raise
        raise BadCheckpoint(f"the tokenizer of {folder} cannot be read: {' '.join(str(error).split())}") from None
    if lost := _unknown_piece(getattr(tokenizer, "backend_tokenizer", None)):
        raise BadCheckpoint(
            f"the tokenizer of {folder} puts '{lost:.80}' around a text and does not say what that is; "
            "download it again"
        )
    # Transformers makes such a tokenizer where it finds no file.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise BadCheckpoint(
            f"{folder} holds no tokenizer, or one without a vocabulary; copy the model's tokenizer files"
        )
    return tokenizer


def _unknown_piece(tokenizer: Any) -> str | None:
    """A token that the template of texts names and does not number, at which the tokenizers package ends the
    process."""
    if tokenizer is None or tokenizer.post_processor is None:
        return None
    state = json.loads(tokenizer.post_processor.__getstate__())
    for part in state.get("processors", [state]):
        if part["type"] == "TemplateProcessing":
            used = [
                piece["SpecialToken"]["id"] for piece in (*part["single"], *part["pair"]) if "SpecialToken" in piece
            ]
            if (lost := next((name for name in used if name not in part["special_tokens"]), None)) is not None:
                return lost
    return None
