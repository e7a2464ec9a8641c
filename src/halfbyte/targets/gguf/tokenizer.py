"""A tokenizer.json as GGUF's tokenizer.* says it to llama.cpp (src/llama-vocab.cpp).

llama.cpp has its own tokenizers: byte-level BPE ("gpt2"), SentencePiece's BPE ("llama") and its unigram model ("t5").
For the first it compiles a pattern per *name* that cuts text into words. The name is found here by that pattern, so
that a model nobody has listed works if its pattern is known, and is refused if it is not: a wrong one would cost
quality and never be noticed.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import BadCheckpoint, Unsupported, brief
from halfbyte.files import is_within, read_object, read_text
from halfbyte.targets.gguf.head import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens: `enum llama_token_type`."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
SEVERAL = {"Regex": " {2,}"}
"""The pattern of several spaces, as converted models of SentencePiece have it."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TITLE, CAPITAL = rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*"
PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LLAMA3 = f"{CONTRACTION}|{WORD}|\\p{{N}}{{1,3}}|{MARKS}|{ENDS}"
QWEN2 = f"{CONTRACTION}|{WORD}|\\p{{N}}|{MARKS}|{ENDS}"
DIGITS = "\\p{N}"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"""[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    (
        (
            f"{CONTRACTION}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}| "
            f"?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*|{ENDS}",
        ),
        False,
    ): "qwen35",
    ((f"{TITLE}|{CAPITAL}|\\p{{N}}|{PATHS}|{ENDS}",), True): "tekken",
    ((f"{TITLE}{CONTRACTION}?|{CAPITAL}{CONTRACTION}?|\\p{{N}}{{1,3}}|{PATHS}|{ENDS}",), False): "gpt-4o",
    ((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3), False): "deepseek-v3",  # noqa: RUF001
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGITS), False): "deepseek-coder",
    ((f"{CONTRACTION}|{WORD}|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\\r\\n]+|{ENDS}",), False): "seed-coder",
    ((r" ?[^(\s|.,!?…。，、।۔،)]+",), False): "bloom",  # noqa: RUF001
    ((r" ?[^(\s|.,!?…。，、।۔،)]+", DIGITS), False): "viking",  # noqa: RUF001
    (("\\p{P}", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"), False): "falcon",
}
"""Patterns that cut text, one after the other, and whether a word that is a token is taken whole whatever the merges
say; llama.cpp's name of it."""

SAME = {
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTION,
    "\r": r"\r",
    "\n": r"\n",
}
"""Ways of writing one part of a pattern."""

# Tokens that end a turn or stand for a part of a file are found by llama.cpp by their text; these have fields of their
# own.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def tokenizer_metadata(folder: Path, vocab_size: int, pre: str | None = None) -> dict[str, Value]:
    """Everything under tokenizer.*, of a vocabulary of as many tokens as the embedding has rows: those that the
    tokenizer lacks are unused.

    `pre` is llama.cpp's name of the pre-tokenizer, for a pattern that is not recognised.
    Raises BadCheckpoint where the folder has no tokenizer, Unsupported for one that llama.cpp would apply otherwise.
    """
    tokenizer, about = read_object(folder / "tokenizer.json"), read_object(folder / "tokenizer_config.json")
    if not tokenizer:
        raise BadCheckpoint(
            f"{folder} has no tokenizer.json, which a GGUF holds; save one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    _require_read(folder / "tokenizer.json")
    _require_texts(about, folder / "tokenizer_config.json")
    try:
        return _metadata(tokenizer, about, folder, vocab_size, pre)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise BadCheckpoint(
            f"{folder}/tokenizer.json is not as tokenizers are: {brief(error)}; download it again"
        ) from None


def _require_read(path: Path) -> None:
    """Raise BadCheckpoint for what the tokenizers package, whose file it is, does not read."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # which is all that the package ever raises
            raise
        raise BadCheckpoint(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _require_texts(about: Mapping[str, Any], path: Path) -> None:
    """Raise BadCheckpoint, naming the entry, for a special token or a chat template that is no text, or no answer to a
    question."""
    for name in (f"{special}_token" for special in SPECIAL):
        token = about.get(name)
        if token is not None and not isinstance(token.get("content") if isinstance(token, dict) else token, str):
            raise BadCheckpoint(f"{path}: {name} is {brief(token)}, which should be a text")
    for name in ("add_bos_token", "add_eos_token"):
        if type(about.get(name)) not in (bool, type(None)):
            raise BadCheckpoint(f"{path}: {name} is {brief(about[name])}, which should be true or false")
    template = about.get("chat_template")
    named = (
        template
        if isinstance(template, list)
        else []
        if template is None
        else [{"name": "default", "template": template}]
    )
    if not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in named
    ):
        raise BadCheckpoint(
            f"{path}: chat_template is {brief(template)}, which should be a text, or a list of texts with names"
        )


def _metadata(
    tokenizer: Mapping[str, Any], about: Mapping[str, Any], folder: Path, vocab_size: int, pre: str | None
) -> dict[str, Value]:
    model = tokenizer["model"]
    kind = (
        "Unigram"
        if model.get("type") == "Unigram"
        else "SPM"
        if model.get("byte_fallback")
        else "BPE"
        if "merges" in model
        else str(model.get("type"))
    )
    if kind == "BPE":
        metadata = _byte_level(tokenizer, pre)
    elif kind == "SPM":
        metadata = _sentencepiece(tokenizer)
    elif kind == "Unigram":
        metadata = _unigram(tokenizer)
    else:
        raise Unsupported(
            f"{folder}/tokenizer.json is a {kind} model; llama.cpp's for such language models are BPE, "
            "SentencePiece and Unigram"
        )
    return (
        metadata
        | _tokens(tokenizer, vocab_size, kind)
        | _special(tokenizer, _about_unknown(about, model, kind), folder, vocab_size)
        | _templates(about, folder)
    )


def _about_unknown(about: Mapping[str, Any], model: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What llama.cpp takes for text that is of no token: it has another number by default, and tokenizer_config.json
    may not say."""
    return about if kind == "BPE" or about.get("unk_token") else {**about, "unk_token": _unknown(model)}


def _require_normalizers(tokenizer: Mapping[str, Any], supported: set[str], before: str) -> None:
    """Raise Unsupported for what llama.cpp does not do to a text; in NFC most text is already, as it trusts."""
    steps = _parts(tokenizer.get("normalizer"), "normalizers")
    unknown = {n["type"] for n in steps} - supported - {"NFC"}
    replaced = [n for n in steps if n["type"] == "Replace" and n["type"] in supported and not _is_of_spaces(n)]
    if unsupported := sorted(unknown | {f"Replace of {brief(n['pattern'])}" for n in replaced}):
        raise Unsupported(
            f"llama.cpp does not normalize text so before {before}, and this tokenizer.json does: "
            f"{', '.join(unsupported)}"
        )


def _is_of_spaces(replace: Mapping[str, Any]) -> bool:
    """Whether what is replaced is a space, or several, by one."""
    return replace["pattern"] in ({"String": " "}, SEVERAL) and replace.get("content") in (" ", SPACE)


def _byte_level(tokenizer: Mapping[str, Any], pre: str | None) -> dict[str, Value]:
    _require_normalizers(tokenizer, set(), "byte-level BPE")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", pre or recognise(tokenizer)),
        # The space that separates the two is none of theirs, since byte-level BPE writes spaces as another letter.
        "tokenizer.ggml.merges": Value(
            "string[]", [" ".join(part.replace(" ", "\u0120") for part in merge) for merge in merges]
        ),
        "tokenizer.ggml.add_space_prefix": Value(
            "bool", any(p.get("add_prefix_space", False) for p in _pre_tokenizers(tokenizer))
        ),
    }


def recognise(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json. Raises Unsupported for a pattern that it has not, or
    that is not known here."""
    patterns = []
    for part in _pre_tokenizers(tokenizer):
        if part["type"] == "Split":
            patterns.append(_same(part["pattern"].get("Regex", part["pattern"].get("String", ""))))
        elif part["type"] == "Digits":
            patterns.append(DIGITS if part.get("individual_digits") else "\\p{N}+")
        elif part["type"] == "Punctuation":
            patterns.append("\\p{P}")
        elif part["type"] == "ByteLevel" and part.get("use_regex", True):
            patterns.append(GPT2)
        elif part["type"] != "ByteLevel":
            patterns.append(part["type"])
    whole = bool(tokenizer["model"].get("ignore_merges"))
    # Whether merges are ignored matters little where the pattern has one name only.
    name = PRE_TOKENIZERS.get((tuple(patterns), whole)) or PRE_TOKENIZERS.get((tuple(patterns), not whole))
    if name is None:
        raise Unsupported(
            f"no pre-tokenizer of llama.cpp is known here for {' then '.join(patterns) or 'no pattern'}; if you know "
            "its name, give it with --pre NAME"
        )
    return name


def _same(pattern: str) -> str:
    for written, meant in SAME.items():
        pattern = pattern.replace(written, meant)
    return pattern


def _sentencepiece(tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    _require_normalizers(tokenizer, {"Prepend", "Replace"}, "SentencePiece's BPE")
    return {
        "tokenizer.ggml.model": Value("string", "llama"),
        "tokenizer.ggml.pre": Value("string", "default"),
        **_space_prefix(tokenizer),
    }


def _unigram(tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    _require_normalizers(tokenizer, {"Prepend", "Replace", "Strip", "Precompiled"}, "Unigram")
    if tokenizer["model"].get("byte_fallback"):
        raise Unsupported(
            "llama.cpp's Unigram takes one unknown token for what is of no piece, and this tokenizer.json takes its "
            "bytes (byte_fallback): a GGUF of it would cut text otherwise"
        )
    prefix = _space_prefix(tokenizer)
    metadata = {
        "tokenizer.ggml.model": Value("string", "t5"),
        "tokenizer.ggml.pre": Value("string", "default"),
        **prefix,
    }
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    charsmap = next((n["precompiled_charsmap"] for n in normalizers if n["type"] == "Precompiled"), None)
    shrinks = any(n["type"] == "Replace" and n["pattern"] == SEVERAL for n in normalizers)
    strips = [n for n in normalizers if n["type"] == "Strip"]
    trims = any(n.get("strip_right", True) for n in strips)
    if (shrinks or strips) and not (shrinks and trims and all(value.value for value in prefix.values())):
        raise Unsupported(
            "llama.cpp's Unigram makes one space of several, drops those at a text's end and puts one before it, or "
            "does none of this; this tokenizer.json does a part of it, so a GGUF would cut text otherwise"
        )
    if charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = Value("uint8[]", list(base64.b64decode(charsmap)))
    return metadata | {"tokenizer.ggml.remove_extra_whitespaces": Value("bool", shrinks)}


def _space_prefix(tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    """Whether a space is put before the text: by a normalizer (Llama 2), or by Metaspace."""
    prepends = any(n["type"] == "Prepend" for n in _parts(tokenizer.get("normalizer"), "normalizers"))
    schemes = [
        p.get("prepend_scheme", "always" if p.get("add_prefix_space", True) else "never")
        for p in _pre_tokenizers(tokenizer)
        if p["type"] == "Metaspace"
    ]
    return {"tokenizer.ggml.add_space_prefix": Value("bool", prepends or any(scheme != "never" for scheme in schemes))}


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, kind: str) -> dict[str, Value]:
    """Texts, kinds and, but for byte-level BPE, scores of all tokens by number."""
    model = tokenizer["model"]
    unigram = kind == "Unigram"
    vocabulary = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    most = max([*vocabulary.values(), *added], default=-1) + 1
    if most > vocab_size:
        raise BadCheckpoint(
            f"tokenizer.json has {most} tokens, and the embedding {vocab_size} rows; llama.cpp wants a row "
            "for every token"
        )
    tokens, kinds, scores = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size, [-10000.0] * vocab_size
    ranks = {} if unigram else _ranks(model["merges"])
    for piece, number in vocabulary.items():
        tokens[number] = piece
        is_byte = kind != "BPE" and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        kinds[number] = BYTE if is_byte else UNKNOWN if kind != "BPE" and piece == _unknown(model) else NORMAL
        # SentencePiece's BPE scores are the merges' numbers, negated; what no merge makes is never chosen, and a byte
        # has none.
        scores[number] = (
            model["vocab"][number][1]
            if unigram
            else 0.0
            if kinds[number] != NORMAL
            else float(-ranks.get(piece, len(ranks)))
        )
    for number, token in added.items():
        if kinds[number] not in (BYTE, UNKNOWN):
            looks = token["special"] or _looks_special(token["content"])
            kinds[number] = CONTROL if looks else USER_DEFINED
        tokens[number] = token["content"] if kinds[number] != USER_DEFINED else token["content"].replace(SPACE, " ")
        scores[number] = -1000.0 if kinds[number] != UNKNOWN else 0.0
    metadata = {
        "tokenizer.ggml.tokens": Value("string[]", tokens),
        "tokenizer.ggml.token_type": Value("int32[]", kinds),
    }
    return metadata if kind == "BPE" else metadata | {"tokenizer.ggml.scores": Value("float32[]", scores)}


def _ranks(merges: list[Any]) -> dict[str, int]:
    """The first merge that makes each piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge), rank)
    return ranks


def _unknown(model: Mapping[str, Any]) -> str | None:
    number = model.get("unk_id")
    return model["vocab"][number][0] if number is not None else model.get("unk_token")


def _looks_special(text: str) -> bool:
    """Some models declare as ordinary what is not: command-r, deepseek-coder and Gemma 2 (llama.cpp's converter treats
    these likewise)."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(a) and text.endswith(b) for a, b in brackets
    )


def _special(tokenizer: Mapping[str, Any], about: Mapping[str, Any], folder: Path, vocab_size: int) -> dict[str, Value]:
    """Numbers of special tokens, and which of them a text begins and ends with."""
    config = read_object(folder / "config.json")
    config = config | (config.get("text_config") or {})
    numbers = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    vocabulary = tokenizer["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    numbers = pieces | numbers
    metadata, special = {}, {}
    for name, key in SPECIAL.items():
        text = about.get(f"{name}_token")
        number = numbers.get(text["content"] if isinstance(text, dict) else text) if text else None
        number = config.get(f"{name}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < vocab_size:
            special[name] = number
            metadata[f"tokenizer.ggml.{key}_token_id"] = Value("uint32", number)
    first, last = _template_ends(tokenizer, numbers)
    for name, number in (("bos", first), ("eos", last)):
        if number is not None and number >= vocab_size:
            raise BadCheckpoint(
                f"{folder}/tokenizer.json puts token {number} around a text, of a vocabulary of {vocab_size}; "
                "download it again"
            )
        adds = number is not None if tokenizer.get("post_processor") else bool(about.get(f"add_{name}_token"))
        if number is not None and number != special.get(name):
            metadata[f"tokenizer.ggml.{name}_token_id"] = Value("uint32", number)
        metadata[f"tokenizer.ggml.add_{name}_token"] = Value("bool", adds and (number is not None or name in special))
    return metadata


def _template_ends(tokenizer: Mapping[str, Any], numbers: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The special tokens that the post-processor puts before and after a text."""
    for part in _parts(tokenizer.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing" and len(part["single"]) > 1:
            ends = (piece.get("SpecialToken", {}).get("id") for piece in (part["single"][0], part["single"][-1]))
            first, last = (
                part["special_tokens"][name]["ids"][0]
                if name in part.get("special_tokens", {})
                else numbers.get(name or "")
                for name in ends
            )
            return first, last
    return None, None


def _templates(about: Mapping[str, Any], folder: Path) -> dict[str, Value]:
    """Chat templates: the default one, and others by name."""
    named: dict[str, str] = {}
    template = about.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
    elif isinstance(template, str):
        named = {"default": template}
    if (folder / "chat_template.jinja").exists() and is_within(folder / "chat_template.jinja", folder):
        named["default"] = read_text(folder / "chat_template.jinja")
    elif "default" not in named and isinstance(
        template := read_object(folder / "chat_template.json").get("chat_template"), str
    ):
        named["default"] = template
    named |= {
        p.stem: read_text(p)
        for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if is_within(p, folder)
    }
    metadata = {
        f"tokenizer.chat_template.{name}": Value("string", text) for name, text in named.items() if name != "default"
    }
    if metadata:
        metadata["tokenizer.chat_templates"] = Value("string[]", [name for name in named if name != "default"])
    return metadata | ({"tokenizer.chat_template": Value("string", named["default"])} if "default" in named else {})


def _pre_tokenizers(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")


def _parts(component: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A component of a tokenizer.json as the list that it may be."""
    if not component:
        return []
    return list(component[inner]) if component["type"] == "Sequence" else [dict(component)]
