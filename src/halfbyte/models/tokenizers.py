"""A tokenizer as Transformers reads it, out of files that anybody may have made."""

from pathlib import Path

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
    """Raises BadCheckpoint for files that are none, too large or too deep, and for what the tokenizers package finds wrong."""
    import transformers

    for name in OBJECTS:
        read_object(folder / name)
    for name in READ_WHOLE:
        if exists(folder / name):
            read_bytes(folder / name)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if type(error) is not Exception:  # which is all that the tokenizers package, written in Rust, ever raises
            raise
        raise BadCheckpoint(f"the tokenizer of {folder} cannot be read: {' '.join(str(error).split())}") from None
