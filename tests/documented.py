"""The commands in README, docs and help: what they are, and what they print where a page shows it.

    python tests/documented.py --write [PAGE]...

runs those whose output is shown, and writes what they print into the pages.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from halfbyte import cli, demo
from halfbyte.cli.entrypoint import COMMANDS, app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SPANS = re.compile(r"`(halfbyte [^`\n]+)`")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
SECONDS = re.compile(r"\d+(?:\.\d+)? s\b")
WIDTH = 100
CLOSE = 0.2
"""How far a figure may be from the one that is shown: calibrated runs differ by processor and threads
(docs/processors.md)."""

# What pages call models: the embedded one, or of well-known ones the header alone, which is all that `plan` reads.
EMBEDDED = ("org/model", "BASE")
OUTLINES = {"meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b", "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b"}
MADE = {
    "model-int4": "--grid int4-g128 --method nearest",
    "model-fp8": "--grid fp8 --method nearest",
    "model-Q4_K_M.gguf": "--grid Q4_K_M --method nearest",
}
"""What commands read that an earlier page made, and how it is made where none did."""
ALIKE = {
    "model": "model-int4", "out": "model-int4", "OUT": "model-int4", "out-1": "model-int4", "out-2": "model-fp8",
    "model-int8": "model-fp8", "model-int4-kv": "model-int4", "model-gptq": "model-int4",
    "model.gguf": "model-Q4_K_M.gguf", "other.gguf": "model-Q4_K_M.gguf",
}  # fmt: skip
"""The same under other names."""
LITTLE = {
    "quantize": "--samples 2 --length 64",
    "kv": "--samples 2 --length 64",
    "imatrix": "--samples 2 --length 64",
    "eval": "--windows 1 --length 64",
    "blame": "--windows 1 --length 64 --blocks 1",
    "run": "--max-tokens 4",
    "bench": "--tokens 2 --prompt 8 --repeats 1",
    "needle": "--lengths 128 --facts 1 --depths 1",
}
"""What makes a run small; commands whose output is shown run as they are."""
NOT_RUN = {
    "halfbyte push": "needs the hub; tests/test_publish.py runs it against one that is played",
    "halfbyte serve": "serves until it is told to end; tests/inference/test_serve.py runs it",
    "curl": "asks a server; tests/inference/test_server.py does, by OpenAI's client",
    "halfbyte chat": "talks; tests/inference/test_dialogue.py plays it on a terminal",
    "halfbyte demo": "tests/test_cli.py runs it on less text",
    "halfbyte support": "tests/test_matrix.py holds docs/support.md to it",
    "--size": "a size is of some large model; tests/budget has budgets of small ones",
    "--suite": "answers are gated; tests/evaluation/test_suites.py runs suites",
    "--tasks": "needs data sets of the hub; tests/evaluation/test_tasks.py runs tasks of its own",
    "--adapter": "needs an adapter; tests/models/test_adapter.py makes one",
    "pip": "needs the network",
    "vllm": "vLLM's own command",
    "llama-server": "llama.cpp's own command",
    "ollama": "Ollama's own command",
    "python": "a program of this repository",
}
"""Commands that are looked at and not run, and why."""


@dataclass(frozen=True)
class Command:
    """One that a page shows."""

    page: Path
    line: str
    shown: str = ""
    """What the page says that it prints."""

    @property
    def words(self) -> list[str]:
        """Of a shell, without the comment behind them."""
        return shlex.split(self.line, comments=True)

    @property
    def names(self) -> list[str]:
        """What NOT_RUN may have it by: the program, the command, an option."""
        return [self.words[0], " ".join(self.words[:2]), *(word for word in self.words if word.startswith("--"))]

    @property
    def why_not_run(self) -> str | None:
        """The reason, for one that is not run."""
        return next((NOT_RUN[name] for name in self.names if name in NOT_RUN), None)


def commands(page: Path) -> list[Command]:
    """Lines of fenced blocks that begin with `$`, each with what follows it; in blocks of bash, all lines."""
    found = []
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] not in ("", "console", "bash"):
            continue
        body = block["body"].replace("\\\n", " ")
        if block["kind"] == "bash":
            found += [Command(page, line) for line in body.splitlines() if line.strip() and not line.startswith("#")]
            continue
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            line, _, shown = part.partition("\n")
            found.append(Command(page, line, shown.strip("\n")))
    return found


def spans(page: Path) -> list[Command]:
    """Commands within a sentence or a table, whole ones."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [Command(page, line) for line in SPANS.findall(text) if "..." not in line]


def examples() -> list[Command]:
    """Those of the help."""
    lines = [line.strip() for function in COMMANDS.values() for line in (function.__doc__ or "").splitlines()]
    return [Command(Path("help"), line) for line in lines if line.startswith("halfbyte ")]


def require_known(words: list[str]) -> None:
    """Raise what the command line says against the words, which are not run."""
    import typer

    with contextlib.suppress(SystemExit):
        group = typer.main.get_command(app)
        name, *rest = words
        command = group.commands[name]
        command.make_context(f"halfbyte {name}", rest)


def make_inputs(words: list[str]) -> None:
    """What a command reads and is not there; what it writes and is there goes."""
    names = list(words)
    for flag in ("-o", "--output"):
        if flag in names:
            remove(Path(names.pop(names.index(flag) + 1)))
    for word in names:
        like = ALIKE.get(word, word)
        if like in MADE and not Path(word).exists():
            run(["quantize", "org/model", "-o", word, *MADE[like].split()])


def remove(output: Path) -> None:
    """A folder, or a file and what lies beside it."""
    shutil.rmtree(output, ignore_errors=True)
    if output.is_file():
        for path in output.parent.glob(f"{output.stem}.*"):
            path.unlink()


def run(words: list[str]) -> tuple[int, str]:
    """The exit code of a command in this process, and what it prints."""
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


def play(command: Command, *more: str) -> tuple[int, str]:
    """Run a command as a page has it, with more options if any; a small run, if nobody reads what it prints."""
    name, *rest = command.words[1:]
    make_inputs([name, *rest])
    few = LITTLE.get(name, "").split() if not command.shown else []
    again = ["--overwrite"] if name == "quantize" and "-o" not in rest else []  # of what it names itself
    return run([name, *rest, *few, *again, *more])


@contextlib.contextmanager
def stage(folder: Path, found: Sequence[Command]) -> Iterator[None]:
    """Inside, the current folder has the models that these commands name. Of the embedded one it is the first layer,
    unless somebody reads what is printed of it."""
    lines = " ".join(command.line for command in found)
    whole = any(command.shown for command in found)
    for name in EMBEDDED:
        shutil.copytree(demo.MODEL, folder / name)
        if not whole:
            cut(folder / name, 1)
    for name, published in OUTLINES.items():
        if name in lines:
            outline(folder / name, published)
    shutil.copy(demo.HELDOUT, folder / "heldout.txt")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def cut(model: Path, layers: int) -> None:
    """Leave the first layers alone."""
    file, config = model / "model.safetensors", json.loads((model / "config.json").read_text())
    tensors = load_file(file)
    kept = {name: t for name, t in tensors.items() if int((re.findall(r"layers\.(\d+)", name) or ["0"])[0]) < layers}
    save_file(kept, file, {"format": "pt"})
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))


def outline(folder: Path, name: str) -> None:
    """A checkpoint of which only config.json and the header exist: the file has holes where its values are."""
    config = yaml.safe_load((ROOT / "tests/sizing/published.yaml").read_text())["models"][name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    header, end = {}, 0
    for tensor, value in model.state_dict().items():
        begin, end = end, end + 2 * value.numel()
        header[tensor] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    about = {**config, "architectures": [type(model).__name__], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(about))


def differs(shown: str, printed: str) -> str:
    """What a page shows that was not printed so; lines of `...` stand for any others. Where lines end, how wide a table
    is and how long something took does not matter, and figures may be a little different."""
    words = _words(printed)
    at, loose = 0, False
    for part in re.split(r"^\s*\.\.\.\s*$", shown, flags=re.MULTILINE):
        wanted = _words(part)
        places = range(at, len(words) - len(wanted) + 1) if loose else range(at, at + 1)
        place = next((i for i in places if all(map(_alike, wanted, words[i : i + len(wanted)]))), None)
        if place is None or len(words) - place < len(wanted):
            return f"{part.strip()}\n--- is not what is printed:\n{printed}"
        at, loose = place + len(wanted), True
    return "" if at == len(words) or shown.rstrip().endswith("...") else f"{printed}\n--- goes on after what is shown"


def _words(text: str) -> list[str]:
    return re.sub("─+", "─", SECONDS.sub("0 s", text)).split()


def _alike(shown: str, printed: str) -> bool:
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(a - b) <= CLOSE * max(abs(a), abs(b)) for a, b in (map(_number, pair) for pair in pairs))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def rewrite(page: Path) -> None:
    """Put what commands print in place of what the page shows; parts that it leaves out stay left out."""
    text = page.read_text(encoding="utf-8")
    for command in commands(page):
        if not command.shown or command.why_not_run:
            continue
        _, printed = play(command)
        if differs(command.shown, printed):
            now = _cut(command.shown, _wrapped(printed))
            text = text.replace(f"{command.line}\n{command.shown}", f"{command.line}\n{now}", 1)
    page.write_text(text, encoding="utf-8")


def _cut(shown: str, printed: str) -> str:
    """As many lines from the beginning, and from the end, as are shown before and after `...`."""
    head, dots, tail = (part.strip("\n") for part in shown.partition("\n...\n"))
    if not dots:
        return printed
    lines, after = printed.splitlines(), len(tail.splitlines())
    return "\n".join([*lines[: len(head.splitlines())], "...", *(lines[-after:] if after else [])])


def _wrapped(text: str) -> str:
    """Sentences in lines that a page has room for; commands stay whole."""
    parts = []
    for line in map(str.rstrip, text.strip("\n").splitlines()):
        is_sentence = len(line) > WIDTH and not line.startswith("halfbyte ")
        parts += textwrap.wrap(line, WIDTH) if is_sentence else [line]
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    for page in [ROOT / name for name in sys.argv[2:]] or PAGES:
        with tempfile.TemporaryDirectory() as place, stage(Path(place), commands(page)):
            rewrite(page)
