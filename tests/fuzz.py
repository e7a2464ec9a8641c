"""Mutated files for every reader: each ends in what the file says, or in one line, in little time and memory.

    python tests/fuzz.py --cases 10000 --readers config index     # all readers by default; prints one line for each

A case is told by its reader, the seed and its number, and comes out the same each time. Chat templates run in processes
of their own: here these are forked off, since a start takes half a second, and have less time and memory.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from halfbyte.containers.safetensors import read_header
from halfbyte.errors import HalfbyteError
from halfbyte.models import adapter, calibrate, chats, render
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.provenance import provenance_of
from halfbyte.recipe import Recipe
from halfbyte.report import inspect, written
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import imatrix, tokenizer
from halfbyte.targets.gguf.head import Value

SECONDS, MEMORY, HEADER = 5, 1 << 30, 64 << 20
"""Of processor time and of memory beyond what the process had, for one case and what it starts; memory where nothing
but a small file is read."""
HANGS = 300
"""Seconds on the clock after which a case waits for something, however busy the machine is: of one with eight others
for each core, 60 were too few for a process that had been ended to be gone."""
WORDS = (
    None, True, -1, 0, 1 << 31, 1 << 64, 10**400, 1e308, float("nan"), "", "x", "[/b]\x1b[2J", "\ud800", [], [1], {},
    {"a": 1}, "9" * 5000
)  # fmt: skip
EXTREMES = (
    0,
    1,
    31,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
FORKED, BESIDE = 0.15, 200e6
"""Seconds of processor time that a chat template has whose process need not start, and bytes."""
HEAD = 4096
"""Bytes at the beginning of a file, where what is parsed lies."""
CHAT = [
    {
        "messages": [
            {"role": "user", "content": "What is wax?"},
            {"role": "assistant", "content": "It is what bees make."},
        ]
    }
]
VALUES = tuple(
    Value(kind, value)
    for kinds, values in (
        (("uint32", "int64", "float32"), (0, 1, 3, 255)),
        (("uint32", "uint64"), ((1 << 31) - 1, (1 << 32) - 1)),
        (("int32", "float32"), (-1,)),
        (("float32",), (float("nan"), float("inf"))),
        (("bool",), (False, True)),
        (("string",), ("", "x", "gpt2", "[/b]\x1b[2J", "y" * 5000)),
        (("uint32[]", "int32[]", "float32[]"), ([], [1], [7] * 264)),
        (("string[]",), ([], ["x"], ["x"] * 264, [" ", ""])),
        (("bool[]",), ([], [True] * 9)),
    )
    for kind in kinds
    for value in values
)
"""Of a GGUF's metadata."""
ALIKE = (
    ("BF16", "F16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"),
    ("F64", "I64", "U64"),
)
"""Dtypes of the same size."""
PIECES = (
    "{{ messages[0].content }}", "{{ messages * 100000 }}", "{{ 'x' * 10000000000 }}", "{{ 9 ** 9 ** 9 }}",
    "{% for a in range(99999) %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "{% endfor %}",
    "{% if messages %}", "{% endif %}",
    "{{ messages.__class__.__mro__ }}", "{{ raise_exception('[/b]\x1b[2J') }}", "{{ bos_token + 1 }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ lipsum(999999) }}", "{% include '/etc/passwd' %}", "{{ messages | map(attribute='x') | list | sort }}", "{{",
    "\x00", "\u202e", "{{ {}.x.y }}",
    "{{ strftime_now('%' * 9999) }}", "{{ messages | tojson(indent=999999999) }}", "{{ 'x'.center(9999999999) }}",
    "{{ 'a' | replace('', 'y' * 999999) }}",
)  # fmt: skip
"""Of templates that anybody may have made."""


# What is damaged ----------------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, the end cut off, a number put in, a stretch left out or repeated, or all but the beginning at
    random."""
    end = min(len(data), HEAD)
    first, last = sorted(rng.randrange(end) for _ in range(2))
    match rng.randrange(5):
        case 0:
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
            return bytes(damaged)
        case 1:
            return data[: rng.randrange(len(data))]
        case 2:
            size = rng.choice((4, 8))
            value = rng.choice((*EXTREMES, rng.getrandbits(64))) % (1 << 8 * size)
            return data[:first] + value.to_bytes(size, "little") + data[first + size :]
        case 3:
            return data[:first] + data[last:] if rng.random() < 0.5 else data[:last] + data[first:]
        case _:
            return data[:24] + rng.randbytes(rng.randrange(HEAD))


def of_json(data: bytes, rng: random.Random) -> bytes:
    """A value replaced by one of another kind, moved, or left out; seldom, the text itself damaged."""
    if rng.random() < 0.1:
        return rng.choice((of_bytes(data, rng), b"[" * 3000, data.replace(b'"', b"'", 1), b"\xef\xbb\xbf" + data))
    root = {"": json.loads(data)}
    for _ in range(rng.choice((1, 1, 1, 3))):
        _change(root, rng)
    return json.dumps(root[""]).encode()


def of_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON, one value a line."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = of_json(lines[at], rng)
    return b"\n".join(lines)


def of_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON at the beginning of a safetensors file: mostly another name, shape or dtype that the tensor's bytes
    would fill as well."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.2:
        header = of_json(data[8:end], rng)
    else:
        said = json.loads(data[8:end])
        for _ in range(rng.choice((1, 1, 3))):
            _disguise(said, rng)
        header = json.dumps(said).encode()
    return struct.pack("<Q", len(header)) + header + data[end:]


def _disguise(header: dict, rng: random.Random) -> None:
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry, shape = header[name], header[name]["shape"]
    match rng.randrange(4):
        case 0:
            header[name], header[other] = header[other], header[name]
        case 1:
            header[rng.choice((f"{name}s", f"{other}.weight", name.replace("0", "1"), "lm_head.weight_scale"))] = (
                header.pop(name)
            )
        case 2:
            sizes = (shape[::-1], [prod(shape)], [1, *shape], [*shape[:-1], 2 * shape[-1]] if shape else [0])
            entry["shape"] = rng.choice(sizes)
        case _:
            alike = next((kinds for kinds in ALIKE if entry["dtype"] in kinds), (entry["dtype"],))
            entry["dtype"] = rng.choice(alike)


def of_metadata(data: bytes, rng: random.Random) -> bytes:
    """Values of a GGUF's metadata: of another type, moved, or left out. Its tensors stay, and hold zeros."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        found = gguf_file.read(path)
        metadata = dict(found.metadata)
        for _ in range(rng.choice((1, 1, 1, 3))):
            key = rng.choice(list(metadata))
            if rng.random() < 0.2:
                del metadata[key]
            else:
                metadata[key] = rng.choice((*VALUES, *metadata.values()))
        gguf_file.GGUFFileWriter(path, metadata, {n: (t.type, t.shape) for n, t in found.tensors.items()}).abandon()
        return path.read_bytes()


def of_template(data: bytes, rng: random.Random) -> bytes:
    """Pieces of hostile templates in a row, within what was there or not."""
    made = "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 1, 2, 4)))).encode()
    at = rng.randrange(len(data))
    return made if rng.random() < 0.5 else data[:at] + made + data[at:]


def _change(root: dict, rng: random.Random) -> None:
    places = list(_places(root))
    parent, key = rng.choice(places)
    if rng.random() < 0.2 and key != "":
        del parent[key]
    else:
        other, at = rng.choice(places)
        parent[key] = copy.deepcopy(rng.choice(WORDS) if rng.random() < 0.8 else other[at])


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


# What reads it ------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> None:
    """What is read is what the reference implementation reads."""
    ours = {name: entry.read() for name, entry in read_header(path).items()}
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        raise AssertionError(f"the safetensors package refuses it: {error}") from None
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[n].flatten().view(torch.uint8), t.flatten().view(torch.uint8)) for n, t in theirs.items()
    )


def read_folder(path: Path) -> None:
    checkpoint = Checkpoint.open(path.parent)
    inspect.inspect(path.parent)
    for module in list(checkpoint.quantized)[:1]:
        checkpoint.read_quantized(module).decode()


def read_tokenizer(path: Path) -> None:
    calibrate.opening(calibrate.tokenizer_of(Checkpoint.open(path if path.suffix == ".gguf" else path.parent)))


def read_tensors(path: Path) -> None:
    """Every byte that the header of a GGUF promises."""
    for stored in gguf_file.read(path).tensors.values():
        stored.entry.read()


def read_gguf(path: Path) -> None:
    gguf_file.read(path)
    checkpoint = Checkpoint.open(path)
    inspect.inspect(path)
    provenance_of(checkpoint, str(path))
    for name in list(checkpoint.tensors())[:2]:
        checkpoint.read(name)


def read_vocabulary(path: Path) -> None:
    """The tokenizer as it is written into a GGUF."""
    said = {
        "general.architecture": Value("string", "llama"),
        **tokenizer.tokenizer_metadata(path.parent, 264),
    }
    gguf_file.GGUFFileWriter(path.parent / "vocabulary.gguf", said, {}).close()


def read_report(path: Path) -> None:
    inspect.inspect(path.parent)
    written.add(path.parent)  # with a card
    written.read(path.parent)


def read_card(path: Path) -> None:
    provenance_of(Checkpoint.open(path.parent), str(path.parent))


def read_adapter(path: Path) -> None:
    checkpoint = adapter.merged(Checkpoint.open(path.parents[1] / "base"), path.parent)
    for tensor in checkpoint.adapter.low_rank:
        checkpoint.read(tensor)


def read_calibration(path: Path, length: int = 16) -> None:
    """Text that a user gives, to windows of tokens; chats through the model's template where it has one."""
    checkpoint = Checkpoint.open(path.parent)
    calibrate.read(checkpoint, calibrate.tokenizer_of(checkpoint), str(path), length)


class Reader(NamedTuple):
    folder: str
    name: str
    """Of the whole file in its folder."""
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], None]
    ignores: bool = False
    """Whether a file that is not as it should be says nothing, in place of being refused."""
    is_slow: bool = False
    """Whether each case starts a process of its own."""
    memory: int = MEMORY


CONTAINERS = {
    "compressed-tensors": "int4-g64",
    "gptq": "int4-g64",
    "awq": "int4-g64-asym",
    "bitsandbytes": "nf4-g64",
    "fp8": "fp8-e4m3-tensor",
}
WEIGHTS = "model.safetensors"
READERS: dict[str, Reader] = {
    "safetensors": Reader("model", WEIGHTS, of_bytes, read_safetensors),
    "header": Reader("model", WEIGHTS, of_header, read_safetensors),
    "gguf": Reader("gguf", "model.gguf", of_bytes, read_gguf),
    "gguf-header": Reader("gguf", "small.gguf", of_bytes, read_tensors, memory=HEADER),
    "gguf-metadata": Reader("gguf", "model.gguf", of_metadata, read_gguf),
    "gguf-tokenizer": Reader("gguf", "model.gguf", of_metadata, read_tokenizer),
    "config": Reader("model", "config.json", of_json, read_folder),
    "index": Reader("model", "model.safetensors.index.json", of_json, read_folder),
    **{f"config-{name}": Reader(name, "config.json", of_json, read_folder) for name in CONTAINERS},
    **{f"header-{name}": Reader(name, WEIGHTS, of_header, read_folder) for name in CONTAINERS},
    "tokenizer": Reader("model", "tokenizer.json", of_json, read_tokenizer),
    "tokenizer-config": Reader("model", "tokenizer_config.json", of_json, read_tokenizer),
    "vocabulary": Reader("model", "tokenizer.json", of_json, read_vocabulary),
    "vocabulary-config": Reader("model", "tokenizer_config.json", of_json, read_vocabulary),
    "jsonl": Reader("plain", "texts.jsonl", of_lines, read_calibration),
    "json": Reader("plain", "texts.json", of_json, read_calibration),
    "csv": Reader("plain", "texts.csv", of_bytes, read_calibration),
    "txt": Reader("plain", "text.txt", of_bytes, read_calibration),
    "report": Reader("compressed-tensors", "report.json", of_json, read_report),
    "card": Reader("model", "README.md", of_bytes, read_card, ignores=True),
    "recipe": Reader("compressed-tensors", "recipe.yaml", of_bytes, Recipe.load),
    "imatrix": Reader("gguf", "imatrix.gguf", of_bytes, imatrix.read, memory=HEADER),
    "imatrix-dat": Reader("gguf", "imatrix.dat", of_bytes, imatrix.read, memory=HEADER),
    "adapter": Reader("adapter", adapter.WEIGHTS, of_header, read_adapter),
    "adapter-config": Reader("adapter", adapter.CONFIG, of_json, read_adapter),
    "template": Reader(
        "chat",
        "chat_template.jinja",
        of_template,
        lambda path: read_calibration(path.parent / "chats.json", 2),
        is_slow=True,
    ),
    "chats": Reader("chat", "chats.json", of_json, read_calibration, is_slow=True),
}


# The harness --------------------------------------------------------------------------------------------------------


def make(home: Path) -> Path:
    """A whole file for each reader."""
    model = tiny.make(home / "model", chat=True, adds_bos=True, num_hidden_layers=1)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(read_header(model / WEIGHTS), WEIGHTS)})
    )
    (model / "README.md").write_text("---\nlicense: mit\nbase_model:\n- org/base\ntags: [a, b]\n---\n# A model\n")
    for name, grid in CONTAINERS.items():
        _quantize(model, home / name, grid, "--to", name)
    (home / "gguf").mkdir()
    _quantize(model, home / "gguf" / "model.gguf", "Q8_0")
    _make_small(home / "gguf" / "small.gguf")
    squares = {
        name: imatrix.Squares(torch.rand(experts, 8), torch.full((experts,), 7.0))
        for name, experts in (("a.weight", 1), ("b.weight", 3))
    }
    imatrix.write(home / "gguf" / "imatrix.gguf", imatrix.Importance(squares, ("text",), 2, 512))
    row = struct.pack("<i8s2i8f", 8, b"a.weight", 7, 8, *range(8))
    (home / "gguf" / "imatrix.dat").write_bytes(struct.pack("<i", 1) + row + struct.pack("<2i4s", 2, 4, b"text"))
    _make_adapter(home)
    _make_texts(home)
    return home


def _quantize(model: Path, out: Path, grid: str, *more: str) -> None:
    made = tiny.halfbyte("quantize", model, "-o", out, "--method", "nearest", "--grid", grid, *more)
    assert made.code == 0, made.err


def _make_small(path: Path) -> None:
    """A GGUF with metadata and tensors of every kind, small enough for damage to hit each."""
    metadata = {
        "general.architecture": Value("string", "llama"),
        "general.alignment": Value("uint32", 32),
        "split.count": Value("uint16", 1),
        "tokens": Value("string[]", ["a", "b", "c"]),
        "scores": Value("float32[]", [0.5, 1.5]),
        "flag": Value("bool", True),
    }
    tensors = {"q": ("Q4_K", (2, 256)), "w": ("F32", (3, 5)), "e": ("IQ4_NL", (2, 2, 32)), "s": ("BF16", ())}
    gguf_file.GGUFFileWriter(path, metadata, tensors).close()


def _make_adapter(home: Path) -> None:
    (home / "adapter").mkdir()
    home_of = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{home_of}.lora_A.weight": torch.randn(4, 128), f"{home_of}.lora_B.weight": torch.randn(128, 4)},
        home / "adapter" / adapter.WEIGHTS,
    )
    about = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 3},
    }
    (home / "adapter" / adapter.CONFIG).write_text(json.dumps(about))


def _make_texts(home: Path) -> None:
    plain = tiny.make(home / "plain", num_hidden_layers=1)
    records = [
        {"text": "The quick brown fox jumps."},
        "A text.",
        {"instruction": "Say wax.", "input": "", "output": "Wax."},
    ]
    (plain / "texts.json").write_text(json.dumps(records))
    (plain / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    (plain / "texts.csv").write_text(
        'prompt,completion\n"Say wax, and\nsay it now.",Wax.\nSay jugs.,"Jugs ""of"" wax."\n' * 4
    )
    tiny.text(plain / "text.txt", 100)
    chat = tiny.make(home / "chat", num_hidden_layers=1)
    (chat / "chat_template.jinja").write_text(tiny.CHAT)
    (chat / "chats.json").write_text(json.dumps(CHAT))


@dataclass
class Found:
    """What came of the cases of one reader."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    """Of processor time, the longest case."""
    memory: int = 0
    """Bytes, the largest case."""


class Forked:
    """What `chats` uses of a Popen, of its program forked off this process, which has imported all that it needs."""

    def __init__(self, *_, **__):
        self.returncode: int | None = None
        told, telling = os.pipe()
        hearing, said = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._run(told, said, (telling, hearing))
        os.close(told)
        os.close(said)
        self.stdin, self.stdout = open(telling, "wb"), open(hearing, "rb")  # noqa: SIM115  as long as this lives

    def _run(self, told: int, said: int, others: tuple[int, int]) -> None:
        """In the child, which never returns."""
        status = 1
        try:
            for end in others:
                os.close(end)
            with open(told, encoding="utf-8") as sys.stdin, open(said, "w", encoding="utf-8") as sys.stdout:
                render.main()
            status = 0
        finally:
            os._exit(status)

    def communicate(self) -> tuple[bytes, bytes]:
        """At its end."""
        self.stdin.close()
        self._ended()
        self.stdout.close()
        return b"", b""

    def poll(self) -> int | None:
        self._ended(os.WNOHANG)
        return self.returncode

    def _ended(self, options: int = 0) -> None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forking():
    """Templates run in processes that are forked off, within less time, and memory beside what these begin with."""
    began = psutil.Process().memory_info().rss
    with (
        mock.patch.object(chats.subprocess, "Popen", Forked),
        mock.patch.object(chats, "SECONDS", FORKED),
        mock.patch.object(chats, "MEMORY", BESIDE + began),
    ):
        yield


def fuzz(reader: str, home: Path, cases: int, seed: int = 0) -> Found:
    """How many files were read and how many refused. Raises at the first that ends otherwise, with its number."""
    folder, name, mutate, read, *_ = READERS[reader]
    found = Found()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(shutil.copytree(home / folder, Path(scratch) / folder))
        (Path(scratch) / "base").symlink_to(home / "plain")
        whole = (place / name).read_bytes()
        for number in range(cases):
            (place / name).write_bytes(mutate(whole, random.Random(f"{reader} {seed} {number}")))
            _try(read, place / name, found, READERS[reader].memory, f"{reader}, seed {seed}, case {number}")
    return found


def _try(read: Callable[[Path], None], path: Path, found: Found, most: int, case: str) -> None:
    def hangs(*_) -> None:
        raise AssertionError(f"{case} hangs")

    signal.signal(signal.SIGALRM, hangs)
    had, children, started = _begin(), _largest_child(), _processor_time()
    signal.alarm(HANGS)
    try:
        read(path)
        found.ends["read"] += 1
    except HalfbyteError as error:
        found.ends["refused"] += 1
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{case}: {error}") from None
    except Exception as error:
        error.add_note(f"fuzz: {case}")
        raise
    finally:
        signal.alarm(0)
    seconds, memory = _processor_time() - started, _peak() - had
    # Known of a process that was started only if it held more than those before it and than this one: Linux counts
    # what this one held at its start as the child's.
    if _largest_child() > max(children, _peak()):
        memory += _largest_child() - (had if subprocess.Popen is Forked else 0)
    found.seconds, found.memory = max(found.seconds, seconds), max(found.memory, memory)
    if seconds > SECONDS or memory > most:
        raise AssertionError(f"{case} took {seconds:.1f} s and {memory >> 20} MB")


def _begin() -> int:
    """Bytes that the process holds; what it held at most before is forgotten where the system can do that (else `_peak`
    tells too much)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """The most that this process held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _largest_child() -> int:
    """The most that one of the processes held that this one ever started."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _processor_time() -> float:
    return sum(os.times()[:4])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", choices=READERS, nargs="*", default=list(READERS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = make(Path(scratch))
        for reader in asked.readers:
            started = time.monotonic()
            with forking() if READERS[reader].is_slow else nullcontext():
                found = fuzz(reader, home, asked.cases, asked.seed)
            print(
                f"{reader}: {found.ends['read']} read, {found.ends['refused']} refused, "
                f"{time.monotonic() - started:.0f} s; "
                f"at most {found.seconds:.2f} s and {found.memory >> 20} MB for one",
                flush=True,
            )
