"""llama.cpp cuts text into the tokens that Hugging Face's tokenizers cut it into."""

import json
from functools import cache
from pathlib import Path

import pytest
import transformers
from llamacpp import load, tokenize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import halfbyte.demo
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.targets.gguf.file import GGUFFileWriter
from halfbyte.targets.gguf.head import Value
from halfbyte.targets.gguf.tokenizer import (
    CAPITAL,
    CONTRACTION,
    DEEPSEEK3,
    LLAMA3,
    PATHS,
    QWEN2,
    TITLE,
    recognise,
    tokenizer_metadata,
)
from halfbyte.targets.gguf.tokenizer_files import tokenizer_files

DEMO = Path(halfbyte.demo.__file__).parent
TEXTS = {
    "prose": "It was the best of times; it wasn't the worst. 'Twas we'll, THEY'RE \u2014 \u201cquoted\u201d \u2026",
    "scripts": "Привет, мир! 你好,世界。こんにちは 안녕하세요 مرحبا بالعالم שלום Ελληνικά Việt Ünïcödé",
    "marks": "नमस्ते दुनिया ภาษาไทย e\u0301te\u0301",
    "emoji": "😀👍🏽 👩‍👩‍👧 flags 🇩🇪🇯🇵 ☃️ zwj\u200djoin nbsp\u00a0here",
    "code": "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x**2}  # ok\n\n\n"
    "\tif x != y && z: /usr/local/bin/python3 --flag=1\r\n",
    "numbers": "1 12 123 1234 12345 3.14159 1,000,000 2024-05-17 0xdeadbeef ½ ² ٣٤٥",
    "spaces": "a  b   c    d\t\te\n\n\nf \n g\n \nh   ",
    "leading": " leading space, and none after",
    "special": "<|bos|>text<|eos|> more<|eos|>",
    "repeated": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa ...... ------- !!!???",
}
ISOLATED = "isolated"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(*patterns: str):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(p), ISOLATED) for p in patterns), BYTES])


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), ISOLATED),
    ]
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
BYTE_LEVEL = {
    "llama-bpe": (split(LLAMA3), True),
    "dbrx": (split(LLAMA3), False),
    "qwen2": (split(QWEN2), False),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (DIGITS, False),
    "tekken": (split(f"{TITLE}|{CAPITAL}|\\p{{N}}|{PATHS}|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"), True),
    "gpt-4o": (
        split(f"{TITLE}{CONTRACTION}?|{CAPITAL}{CONTRACTION}?|\\p{{N}}{{1,3}}|{PATHS}|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
        False,
    ),
    "falcon": (FALCON, False),
    "qwen35": (split(QWEN35), False),
    "seed-coder": (split(SEED), False),
    "bloom": (split(BLOOM), False),
    "viking": (split(BLOOM, "\\p{N}"), False),
    "deepseek-coder": (split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"), False),
    "deepseek-v3": (split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3), False),  # noqa: RUF001
}
UNEQUAL = {
    ("tekken", "marks"),
    ("gpt-4o", "marks"),
    *(("falcon", text) for text in ("scripts", "marks", "code", "numbers")),
}
"""Where llama.cpp's own rendering of the pattern is not exact: combining marks count as letters only in the pattern;
Falcon looks for digits among bytes."""


def corpus() -> list[str]:
    return [(DEMO / "text" / "calibration.txt").read_text()[:200_000], *TEXTS.values()]


@cache
def learned() -> dict:
    """Merges of text that nothing has cut: they go across every border of words, so what comes out shows where a
    pattern cuts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[\s\S]{1,12}"), ISOLATED), BYTES])
    shifted = [text[i:] for text in TEXTS.values() for i in range(12)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=2,
    )
    made.train_from_iterator(shifted, trainer)
    return json.loads(made.to_str())["model"]


def byte_level(pre_tokenizer, ignore_merges: bool) -> Tokenizer:
    made = Tokenizer(
        models.BPE(learned()["vocab"], [tuple(m) for m in learned()["merges"]], ignore_merges=ignore_merges)
    )
    made.add_special_tokens(["<|bos|>", "<|eos|>"])
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return made


def sentencepiece(prefix: bool) -> Tokenizer:
    """As LlamaTokenizerFast (prefix) and GemmaTokenizerFast are converted from SentencePiece's BPE."""
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<|bos|>", "<|eos|>"], show_progress=False),
    )
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    pieces = ["<unk>", "<|bos|>", "<|eos|>", *(f"<0x{b:02X}>" for b in range(256))]
    made_by = ["".join(m) for m in merges]
    pieces += [*dict.fromkeys(made_by)] + [p for p in learned["vocab"] if p not in set(made_by) | set(pieces)]
    made = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizer
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<|bos|>", "<|eos|>")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return made


def save(made: Tokenizer, folder: Path, **about) -> Path:
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>", **about}))
    return folder


def vocabulary(folder: Path, path: Path, vocab_size: int, **options):
    """The tokenizer of a folder in llama.cpp, without a model."""
    GGUFFileWriter(
        path,
        {"general.architecture": Value("string", "llama"), **tokenizer_metadata(folder, vocab_size, **options)},
        {},
    ).close()
    return load(path, vocabulary_only=True)


def differing(made: Tokenizer, model, texts: dict[str, str]) -> dict[str, tuple]:
    found = {}
    for name, text in texts.items():
        ours, theirs = tokenize(model, text), made.encode(text).ids
        if ours != theirs:
            found[name] = ([made.id_to_token(i) for i in ours], [made.id_to_token(i) for i in theirs])
    return found


def test_the_demo_models_tokenizer_cuts_the_same(tmp_path):
    made = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    model = vocabulary(DEMO / "model", tmp_path / "v.gguf", 4096)
    assert differing(made, model, TEXTS | {"held out": (DEMO / "text" / "heldout.txt").read_text()[:20_000]}) == {}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_bpe_cuts_the_same(name, tmp_path):
    made = byte_level(*BYTE_LEVEL[name])
    folder = save(made, tmp_path / "model")
    said = tokenizer_metadata(folder, 6000)
    assert said["tokenizer.ggml.pre"].value == name
    texts = {key: text for key, text in TEXTS.items() if (name, key) not in UNEQUAL}
    assert differing(made, vocabulary(folder, tmp_path / "v.gguf", 6000), texts) == {}


@pytest.mark.parametrize("prefix", [True, False], ids=["llama-2", "gemma"])
def test_sentencepiece_bpe_cuts_the_same(prefix, tmp_path):
    made = sentencepiece(prefix)
    folder = save(made, tmp_path / "model")
    assert tokenizer_metadata(folder, 6000)["tokenizer.ggml.model"].value == "llama"
    assert differing(made, vocabulary(folder, tmp_path / "v.gguf", 6000), TEXTS) == {}


@cache
def unigram() -> Tokenizer:
    """As SentencePiece's unigram models are converted."""
    made = Tokenizer(models.Unigram())
    steps = [normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), " ")]
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    special = ["<unk>", "<|bos|>", "<|eos|>"]
    made.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return made


@pytest.mark.slow
def test_unigram_cuts_the_same(tmp_path):
    folder = save(unigram(), tmp_path / "model")
    assert tokenizer_metadata(folder, 1200)["tokenizer.ggml.model"].value == "t5"
    texts = {name: TEXTS[name] for name in ("prose", "repeated", "special")}
    texts |= {"unknown": "tea \N{SNOWMAN}, and more", "ends": "  so  it ends  "}
    assert differing(unigram(), vocabulary(folder, tmp_path / "v.gguf", 1200), texts) == {}


def test_what_llama_cpp_does_not_do_to_a_text_is_refused(tmp_path):
    """It would cut text otherwise, and say nothing: bytes for what is of no piece, and normalizers."""
    folder = save(unigram(), tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text())
    normalized = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    steps = whole["normalizer"]["normalizers"]
    for changed, why in (
        (whole | {"model": whole["model"] | {"byte_fallback": True}}, "byte_fallback"),
        (whole | {"normalizer": normalized}, "Unigram.*Lowercase, NFKC"),
        (whole | {"normalizer": {"type": "Sequence", "normalizers": steps[1:]}}, "a part of it"),
        (whole | {"normalizer": {"type": "Sequence", "normalizers": steps[:1]}}, "a part of it"),
        (whole | {"normalizer": steps[1] | {"pattern": {"String": "a"}}}, "Replace of {'String': 'a'}"),
        (whole | {"pre_tokenizer": whole["pre_tokenizer"] | {"prepend_scheme": "never"}}, "a part of it"),
        (json.loads(sentencepiece(True).to_str()) | {"normalizer": normalized}, "BPE.*Lowercase, NFKC"),
        (json.loads(sentencepiece(True).to_str()) | {"normalizer": steps[0]}, "BPE.*Strip"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(Unsupported, match=why):
            tokenizer_metadata(folder, 1500)


def test_added_tokens_are_found_in_text(tmp_path):
    made = byte_level(split(QWEN2), False)
    made.add_tokens(
        [AddedToken("<think>", special=False, normalized=False), AddedToken("    ", special=False, normalized=False)]
    )
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = save(made, tmp_path / "model", eos_token="<|im_end|>")
    texts = {"chat": "<|im_start|>user\nWhy?<|im_end|>\n<think>\nso    what</think>    <think>"}
    model = vocabulary(folder, tmp_path / "v.gguf", 6100)
    assert differing(made, model, texts) == {}
    assert model.token_eos() == made.token_to_id("<|im_end|>")
    assert model.token_bos() == 0


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_begins_as_the_tokenizer_begins_it(adds_bos, tmp_path):
    made = byte_level(split(LLAMA3), True)
    if not adds_bos:
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    folder = save(made, tmp_path / "model")
    assert differing(made, vocabulary(folder, tmp_path / "v.gguf", 6000), TEXTS) == {}


def test_chat_templates_come_along(tmp_path):
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    said = tokenizer_metadata(save(byte_level(split(LLAMA3), True), tmp_path / "model", chat_template=templates), 6000)
    assert said["tokenizer.chat_template"].value == "{{ a }}"
    assert said["tokenizer.chat_template.tool_use"].value == "{{ b }}"
    assert said["tokenizer.chat_templates"].value == ["tool_use"]
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ c }}")
    assert tokenizer_metadata(tmp_path / "model", 6000)["tokenizer.chat_template"].value == "{{ c }}"


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"\d+ tokens, and the embedding 300 rows"):
        tokenizer_metadata(save(byte_level(split(LLAMA3), True), tmp_path / "model"), 300)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"no tokenizer\.json"):
        tokenizer_metadata(tmp_path, 5000)


def test_an_unknown_pattern_is_refused_unless_named(tmp_path):
    folder = save(byte_level(split(r"[a-z]+|[^a-z]+"), False), tmp_path / "model")
    with pytest.raises(Unsupported, match=r"\[a-z\]\+.*--pre NAME"):
        tokenizer_metadata(folder, 6000)
    assert tokenizer_metadata(folder, 6000, pre="gpt-2")["tokenizer.ggml.pre"].value == "gpt-2"
    with pytest.raises(Unsupported, match="Whitespace"):
        recognise({"model": {}, "pre_tokenizer": {"type": "Whitespace"}})


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama-2", "gemma", "unigram", "demo"])
def test_a_tokenizer_comes_back_from_its_gguf(name, tmp_path):
    if name == "demo":
        made, folder = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")), DEMO / "model"
    else:
        made = unigram() if name == "unigram" else None
        made = made or (byte_level(*BYTE_LEVEL[name]) if name in BYTE_LEVEL else sentencepiece(name == "llama-2"))
        folder = save(made, tmp_path / "model", chat_template="{{ messages }}")
    files = tokenizer_files(tokenizer_metadata(folder, 6000))
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        assert back(text).input_ids == made.encode(text).ids
        assert back.decode(back(text).input_ids, skip_special_tokens=False) == made.decode(
            made.encode(text).ids, skip_special_tokens=False
        )
    assert (back.bos_token, back.eos_token) == ("<|bos|>", "<|eos|>")
    assert name == "demo" or back.chat_template == "{{ messages }}"


def test_a_pre_tokenizer_that_is_not_known_is_not_read(tmp_path):
    said = tokenizer_metadata(save(byte_level(split(LLAMA3), True), tmp_path / "model"), 6000, pre="kimi-k2")
    with pytest.raises(Unsupported, match=r"'kimi-k2' is not known here; take the model's Hugging Face folder"):
        tokenizer_files(said)
