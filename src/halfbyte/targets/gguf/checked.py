"""Metadata of a GGUF that anybody may have made, as far as it is used: of the types that llama.cpp reads, and of sizes
that a model may have."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from halfbyte.containers.config import require_sound
from halfbyte.errors import BadCheckpoint, Unsupported, brief
from halfbyte.targets.gguf.head import Value
from halfbyte.targets.gguf.hyperparameters import KEYS, SAME

NEEDED = ("block_count", "embedding_length", "attention.head_count")
ABOVE_ZERO = (*NEEDED, "attention.head_count_kv", "attention.key_length")
PATTERN = "attention.sliding_window_pattern"
"""What is a list, with an entry for each layer."""
KINDS: dict[str, tuple[type, ...]] = {"uint32": (int,), "float32": (int, float), "bool": (bool,), "string": (str,)}


STRINGS = (
    "architecture|type|name|author|version|organization|description|finetune|basename|size_label|url|doi|uuid|repo_url"
    r"|quantized_by|license|license\.(name|link)|source\..+|(base_model|dataset)\.\d+\..+"
)
TYPES = {
    rf"general\.({STRINGS})": "string",
    r"general\.(tags|languages)": "string[]",
    r"general\.(alignment|file_type|quantization_version|(base_model|dataset)\.count)": "uint32",
    r"tokenizer\.(chat_template(\..+)?|ggml\.(model|pre))": "string",
    r"tokenizer\.(chat_templates|ggml\.(tokens|merges))": "string[]",
    r"tokenizer\.ggml\.token_type": "int32[]",
    r"tokenizer\.ggml\.scores": "float32[]",
    r"tokenizer\.ggml\.\w+_token_id": "uint32",
    r"tokenizer\.ggml\.(add_\w+|remove_extra_whitespaces)": "bool",
}
"""Keys of every architecture, and the only type in which llama.cpp reads them (src/llama-model-loader.cpp, get_key)."""


def require_types(metadata: Mapping[str, Value]) -> None:
    """Raise BadCheckpoint, naming the key, for a value with which llama.cpp would refuse the file."""
    arch = metadata["general.architecture"].value if "general.architecture" in metadata else ""
    sizes = {f"{arch}.{name}": key.type for name, key in KEYS.items()}
    for name, value in metadata.items():
        wanted = sizes.get(name) or next((kind for key, kind in TYPES.items() if re.fullmatch(key, name)), value.type)
        by_layer = name in sizes and isinstance(value.value, list)
        if value.type not in ((f"{wanted}[]", "int32[]") if by_layer else (wanted,)):
            raise BadCheckpoint(
                f"the GGUF's {brief(name)} is the {value.type} {brief(value.value)}, which should be {wanted}; "
                "llama.cpp loads no such file: take the original model, or one that was converted anew"
            )


def require_hyperparameters(metadata: Mapping[str, Value], arch: str) -> None:
    """Raise BadCheckpoint, naming the key, for what is missing or is no such value; Unsupported for layers of different
    sizes."""
    for name, key in KEYS.items():
        value = metadata.get(f"{arch}.{name}")
        if value is None:
            if name in NEEDED:
                raise BadCheckpoint(f"the GGUF does not say its {arch}.{name}; convert the model again")
            continue
        items = value.value if isinstance(value.value, list) and name in (*SAME, PATTERN) else [value.value]
        if name == PATTERN and items is not value.value:
            raise BadCheckpoint(
                f"the GGUF's {arch}.{name} is {brief(value.value)}, which should be a list, with an entry "
                "for each layer"
            )
        if name in ABOVE_ZERO and 0 in items:
            raise BadCheckpoint(f"the GGUF's {arch}.{name} is 0, which should be above 0")
        if not items or any(type(item) not in KINDS[key.type] for item in items):
            raise BadCheckpoint(
                f"the GGUF's {arch}.{name} is {brief(value.value)}, which should be {key.type}, not {value.type}"
            )
        if name in SAME and len(set(items)) > 1:
            raise Unsupported(
                f"the GGUF's {arch}.{name} differs from layer to layer ({brief(items)}), which is not read here; "
                "take the original model"
            )
        require_sound(dict.fromkeys(key.names, items[0]), f"the GGUF's {arch}.{name}")


def require_tokenizer(metadata: Mapping[str, Value], special: Collection[str]) -> None:
    """Raise BadCheckpoint for a vocabulary whose parts are of other types or lengths; `special` are the keys of special
    tokens."""
    require_types({name: value for name, value in metadata.items() if name.startswith("tokenizer.")})

    def get(key: str) -> Any:
        value = metadata.get(f"tokenizer.{key}")
        return None if value is None else value.value

    tokens = get("ggml.tokens") or []
    for key in ("ggml.token_type", "ggml.scores"):
        if (values := get(key)) is not None and len(values) != len(tokens):
            raise BadCheckpoint(f"the GGUF's tokenizer.{key} has {len(values)} entries for {len(tokens)} tokens")
    texts = [
        text
        for key in ("ggml.model", "ggml.pre", "chat_template", "chat_templates", "ggml.merges")
        for entry in [get(key)]
        if entry is not None
        for text in (entry if isinstance(entry, list) else [entry])
    ]
    if half := next((text for text in (*tokens, *texts) if not text.isascii() and _is_broken(text)), None):
        raise BadCheckpoint(
            f"the GGUF's tokenizer has {half!r}, which is not UTF-8 text; take the model's Hugging Face folder"
        )
    if any(" " not in merge[1:] for merge in get("ggml.merges") or []):
        raise BadCheckpoint("the GGUF's tokenizer.ggml.merges has an entry that is no two tokens")
    for key in special:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not (type(number.value) is int and 0 <= number.value < len(tokens)):
            raise BadCheckpoint(
                f"the GGUF's tokenizer.ggml.{key}_token_id is {brief(number.value)}, and there are {len(tokens)} tokens"
            )


def _is_broken(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
