"""Mutated files for every reader: each ends in what the file says, or in one line, within seconds.

    python tests/fuzz.py --cases 10000 --reader config     # all readers by default; prints one line for each

A case is told by its reader, the seed and its number, and comes out the same each time.
"""

import argparse
import copy
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from halfbyte.containers.safetensors import read_header
from halfbyte.errors import HalfbyteError
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.recipe import Recipe
from halfbyte.report import inspect, written
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import imatrix, tokenizer

SECONDS = 5
WORDS = (
    None,
    True,
    -1,
    0,
    1 << 31,
    1 << 64,
    10**400,
    1e308,
    float("nan"),
    "",
    "x",
    "[/b]\x1b[2J",
    [],
    [1],
    {},
    {"a": 1},
    "9" * 5000,
)
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
HEAD = 4096
"""Bytes at the beginning of a file, where what is parsed lies."""


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, the end cut off, a number put in, a stretch left out or repeated, or all but the beginning at random."""
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
        places = list(_places(root))
        parent, key = rng.choice(places)
        if rng.random() < 0.2 and key != "":
            del parent[key]
        else:
            parent[key] = copy.deepcopy(
                rng.choice(WORDS) if rng.random() < 0.8 else (lambda p: p[0][p[1]])(rng.choice(places))
            )
    return json.dumps(root[""]).encode()


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


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


def read_gguf(path: Path) -> None:
    gguf_file.read(path)
    checkpoint = Checkpoint.open(path)
    inspect.inspect(path)
    for name in list(checkpoint.tensors())[:2]:
        checkpoint.read(name)


def read_vocabulary(path: Path) -> None:
    """The tokenizer as it is written into a GGUF."""
    said = tokenizer.tokenizer_metadata(path.parent, 264)
    gguf_file.Writer(
        path.parent / "vocabulary.gguf", {"general.architecture": gguf_file.Value("string", "llama"), **said}, {}
    ).close()


READERS: dict[str, tuple[str, str, Callable[[bytes, random.Random], bytes], Callable[[Path], object]]] = {
    "safetensors": ("model", "model.safetensors", of_bytes, read_safetensors),
    "config": ("model", "config.json", of_json, read_folder),
    "index": ("model", "model.safetensors.index.json", of_json, read_folder),
    "quantized": ("quantized", "config.json", of_json, read_folder),
    "tokenizer": (
        "model",
        "tokenizer.json",
        of_json,
        lambda path: calibrate.tokenizer_of(Checkpoint.open(path.parent)),
    ),
    "vocabulary": ("model", "tokenizer.json", of_json, read_vocabulary),
    "specials": ("model", "tokenizer_config.json", of_json, read_vocabulary),
    "report": (
        "quantized",
        "report.json",
        of_json,
        lambda path: (written.read(path.parent), inspect.inspect(path.parent)),
    ),
    "recipe": ("quantized", "recipe.yaml", of_bytes, Recipe.load),
    "gguf": ("gguf", "model.gguf", of_bytes, read_gguf),
    "imatrix": ("gguf", "imatrix.gguf", of_bytes, imatrix.read),
}
"""Folder and name of the whole file, how it is mutated, and what reads it."""


def make(home: Path) -> Path:
    """A whole file for each reader."""
    tiny.make(home / "model", chat=True, adds_bos=True, num_hidden_layers=1)
    names = read_header(home / "model" / "model.safetensors")
    (home / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    (home / "gguf").mkdir()
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", home / "quantized", "--method", "nearest", "--grid", "int4-g64"
        ).code
        == 0
    )
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", home / "gguf" / "model.gguf", "--method", "nearest", "--grid", "Q8_0"
        ).code
        == 0
    )
    squares = {
        name: imatrix.Squares(torch.rand(experts, 8), torch.full((experts,), 7.0))
        for name, experts in (("a.weight", 1), ("b.weight", 3))
    }
    imatrix.write(home / "gguf" / "imatrix.gguf", imatrix.Importance(squares, ("text",), 2, 512))
    return home


def fuzz(reader: str, home: Path, cases: int, seed: int = 0) -> Counter[str]:
    """How many files were read and how many refused. Raises at the first that ends otherwise, with its number."""
    folder, name, mutate, read = READERS[reader]
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(shutil.copytree(home / folder, Path(scratch) / folder))
        whole = (place / name).read_bytes()
        for number in range(cases):
            (place / name).write_bytes(mutate(whole, random.Random(f"{reader} {seed} {number}")))
            started = time.process_time()
            signal.alarm(4 * SECONDS)
            try:
                read(place / name)
                found["read"] += 1
            except HalfbyteError as error:
                found["refused"] += 1
                if len(str(error).splitlines()) != 1:
                    raise AssertionError(f"{reader} {seed} {number}: {error}") from None
            except Exception as error:
                error.add_note(f"fuzz: {reader}, seed {seed}, case {number}")
                raise
            finally:
                signal.alarm(0)
            if time.process_time() - started > SECONDS:
                raise AssertionError(f"{reader} {seed} {number} took {time.process_time() - started:.1f} s")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, nargs="*", default=list(READERS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = make(Path(scratch))
        for reader in asked.reader:
            started = time.monotonic()
            found = fuzz(reader, home, asked.cases, asked.seed)
            print(
                f"{reader}: {found['read']} read, {found['refused']} refused, {time.monotonic() - started:.0f} s",
                flush=True,
            )
