"""The tokenizer.json and tokenizer_config.json of a GGUF that has none beside it."""

from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.targets.gguf.head import Value
from halfbyte.targets.gguf.tokenizer import (
    CONTROL,
    DIGITS,
    GPT2,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

Get = Callable[..., Any]
"""What the file says under tokenizer.*, by the rest of the name; else what is given in its place."""
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "glm4"),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "mellum", "exaone4", "trillion"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-4o": ("llama4", "kanana2"),
    "bloom": ("poro-chat", "gpt3-finnish"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
}
"""llama.cpp's further names of the same pattern (src/llama-vocab.cpp)."""
BEGIN_BY_DEFAULT = {"llama-bpe", "tekken"}
"""Pre-tokenizers after which llama.cpp begins a text with bos unless the file says otherwise."""


def tokenizer_files(metadata: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """File name to content. Raises Unsupported for a tokenizer that tokenizer.json has no like of here, BadCheckpoint
    for a file without one."""

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.{key}")
        return default if value is None else value.value

    model, tokens = get("ggml.model"), get("ggml.tokens")
    if not tokens:
        raise BadCheckpoint("the GGUF holds no tokenizer; take the model's Hugging Face folder")
    kinds = get("ggml.token_type", [NORMAL] * len(tokens))
    pre = next((name for name, others in ALIASES.items() if get("ggml.pre") in others), get("ggml.pre", "default"))
    if model == "gpt2":
        body = _byte_level(tokens, kinds, get("ggml.merges", []), pre)
    elif model == "t5":
        body = _unigram(tokens, kinds, get("ggml.scores"), get)
    elif model == "llama":
        body = _sentencepiece(tokens, kinds, get("ggml.scores"), get("ggml.add_space_prefix", True))
    else:
        raise Unsupported(
            f"the GGUF's tokenizer is of kind '{model}', and gpt2 (byte-level BPE), llama (SentencePiece's BPE) and t5 "
            "(Unigram) are read; take the model's Hugging Face folder"
        )
    special = {name: get(f"ggml.{key}_token_id") for name, key in SPECIAL.items()}
    ends = [get("ggml.add_bos_token", model == "llama" or pre in BEGIN_BY_DEFAULT), get("ggml.add_eos_token", False)]
    first, last = (
        number if adds else None for adds, number in zip(ends, (special["bos"], special["eos"]), strict=True)
    )
    added = [
        _added(number, tokens[number], kind)
        for number, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **body}
    tokenizer["post_processor"] = (
        _template(tokens, first, last) if (first, last) != (None, None) else tokenizer["post_processor"]
    )
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about |= {f"{name}_token": tokens[number] for name, number in special.items() if number is not None}
    if (template := get("chat_template")) is not None:
        named = [{"name": name, "template": get(f"chat_template.{name}")} for name in get("chat_templates", [])]
        about["chat_template"] = [{"name": "default", "template": template}, *named] if named else template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": about}


def _byte_level(tokens: list[str], kinds: list[int], merges: list[str], pre: str) -> dict[str, Any]:
    found = next(((patterns, whole) for (patterns, whole), name in PRE_TOKENIZERS.items() if name == pre), None)
    if found is None:
        raise Unsupported(f"the GGUF's pre-tokenizer '{pre}' is not known here; take the model's Hugging Face folder")
    patterns, whole = found
    steps = [_cut(pattern) for pattern in patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if byte_level | {"use_regex": True} not in steps:
        steps.append(byte_level)
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [_pair(merge) for merge in merges],
            "ignore_merges": whole,
            "byte_fallback": False,
        },
    }


def _cut(pattern: str) -> dict[str, Any]:
    """The part of a tokenizer.json that `recognise` calls by `pattern`."""
    if pattern == GPT2:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pattern in (DIGITS, "\\p{N}+"):
        return {"type": "Digits", "individual_digits": pattern == DIGITS}
    if pattern == "\\p{P}":
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _pair(merge: str) -> list[str]:
    """Its halves: a space that is none between them can only stand first."""
    at = merge.find(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def _sentencepiece(tokens: list[str], kinds: list[int], scores: list[float] | None, prefix: bool) -> dict[str, Any]:
    if scores is None:
        raise BadCheckpoint("the GGUF's SentencePiece vocabulary has no scores; take the model's Hugging Face folder")
    pieces = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    merges = _merges(pieces, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _unigram(tokens: list[str], kinds: list[int], scores: list[float] | None, get: Get) -> dict[str, Any]:
    if scores is None:
        raise BadCheckpoint("the GGUF's Unigram vocabulary has no scores; download it again")
    used = max((i for i, kind in enumerate(kinds) if kind != UNUSED), default=-1) + 1
    # What is unknown costs more than the rarest piece: others, which no text is cut into, have no say in that.
    worst = min((scores[i] for i in range(used) if kinds[i] == NORMAL), default=0.0)
    others = {UNUSED: worst, CONTROL: 0.0, UNKNOWN: 0.0}
    charsmap, shrinks = get("ggml.precompiled_charsmap"), get("ggml.remove_extra_whitespaces", False)
    steps = [{"type": "Precompiled", "precompiled_charsmap": b64encode(bytes(charsmap)).decode()}] if charsmap else []
    if shrinks:
        steps += [
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    scheme = "always" if get("ggml.add_space_prefix", True) else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None),
            "vocab": [[tokens[i], others.get(kinds[i], scores[i])] for i in range(used)],
            "byte_fallback": False,
        },
    }


def _merges(pieces: Mapping[str, int], scores: list[float]) -> list[list[str]]:
    """SentencePiece joins whatever two pieces make the piece of the best score; tokenizer.json lists these pairs, best
    first."""
    by_score = sorted(
        (piece for piece in pieces if len(piece) > 1), key=lambda piece: (-scores[pieces[piece]], pieces[piece])
    )
    return [
        [piece[:i], piece[i:]]
        for piece in by_score
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]


def _added(number: int, text: str, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": kind != USER_DEFINED}


def _template(tokens: list[str], first: int | None, last: int | None) -> dict[str, Any]:
    """A post-processor that begins and ends a text with these tokens."""
    before = [{"SpecialToken": {"id": tokens[first], "type_id": 0}}] if first is not None else []
    after = [{"SpecialToken": {"id": tokens[last], "type_id": 0}}] if last is not None else []
    used = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in (first, last) if n is not None}
    one, two = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, one, *after],
        "pair": [*before, one, *after, two, *after],
        "special_tokens": used,
    }
