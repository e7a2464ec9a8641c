"""A checkpoint that is made in a second (two Llama layers of random weights, a tokenizer of single bytes), and the
command line on it."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from halfbyte import cli
from halfbyte.containers.folder import OutputFolder

# Tests run side by side: on matrices this small, threads that wait for each other cost ten times what they save.
torch.set_num_threads(1)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
"""The environment of a process of its own."""


@contextlib.contextmanager
def cut_after_each_record(monkeypatch):
    """Inside, whatever writes a checkpoint is interrupted as soon as it has noted a step as done."""
    record = OutputFolder.record

    def cut(self, value):
        record(self, value)
        if "rows" in value:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "record", cut)
        yield


WAIT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from halfbyte import cli
from halfbyte.containers.folder import OutputFolder
record = OutputFolder.record

def wait(self, value):
    record(self, value)
    if "rows" in value:
        print("waiting", flush=True)
        time.sleep(600)

OutputFolder.record = wait
cli.main(sys.argv[1:])
"""
"""A run that waits, once it has noted a step as done, for whatever comes from outside."""
# The command line in a process of its own, which sends itself a signal when a number of records is in the journal.
CUT = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup, and in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
from halfbyte import cli
from halfbyte.containers.folder import OutputFolder
number, after = int(sys.argv[1]), int(sys.argv[2])
record, seen = OutputFolder.record, 0

def cut(self, value):
    global seen
    record(self, value)
    seen += 1
    if seen > after:
        os.kill(os.getpid(), number)

OutputFolder.record = cut
cli.main(sys.argv[3:])
"""

BOS, EOS = "<bos>", "<eos>"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boil",
    "quaint",
    "black",
    "jugs",
    "of",
    "wax",
]


def config(**changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 256, "eos_token_id": 257, "rms_norm_eps": 1e-5, "dtype": "bfloat16", **changes,
    }  # fmt: skip


def make(folder: Path, seed: int = 0, chat: bool = False, adds_bos: bool = False, **changes) -> Path:
    """Write a checkpoint into `folder`."""
    folder.mkdir(parents=True)
    settings = config(**changes)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer(adds_bos).save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        **({"chat_template": CHAT} if chat else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    for p in model.parameters():  # louder than the usual 0.02, so that rounding is seen in the logits
        if p.dim() == 2:
            p.data.mul_(4)
    tied = {"lm_head.weight"} if settings["tie_word_embeddings"] else set()
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def tokenizer(adds_bos: bool) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {BOS: 256, EOS: 257}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.add_special_tokens([BOS, EOS])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    return made


def text(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """Some text of `words` words."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(WORDS[i] for i in picks))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def halfbyte(*words: object) -> Result:
    """The command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, *wanted: str) -> None:
    """One clear line that says all of `wanted`, exit code 2, and nothing on standard output."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("halfbyte: ")
    assert result.err.count("\n") == 1, result.err
    for words in wanted:
        assert words in result.err
