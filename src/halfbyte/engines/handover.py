"""Which engine serves a checkpoint, of those that are here, and the command that starts it."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from halfbyte.containers.kv import served
from halfbyte.engines.engines import ENGINES, SERVERS, ServerOptions, server_named
from halfbyte.engines.verdicts import Verdict, Word, check
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.registry import FORMS, source_suffix

ORIGINAL = "{original}"
"""In the command of an engine that needs the model in 16 bits too."""
HIDDEN = "..."
"""What is shown of a key."""


@dataclass(frozen=True)
class Listening:
    """Where a server is to listen, and what it is to be like; None is left to the engine."""

    host: str
    port: int
    key: str | None = None
    name: str | None = None
    context: int | None = None
    slots: int | None = None


@dataclass(frozen=True)
class Command:
    """What starts an engine's server."""

    engine: str
    words: tuple[str, ...]
    variables: Mapping[str, str]
    """What its environment has beside ours."""
    key: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For a shell, without the key."""
        shown = (HIDDEN if word == self.key else shlex.quote(word) for word in self.words)
        return " ".join([*(f"{name}={HIDDEN}" for name in self.variables), *shown])


def handover(checkpoint: Checkpoint, asked: Listening, engine: str | None = None, more: Sequence[str] = ()) -> Command:
    """The command of the engine that is asked for, or else of the one that loads the checkpoint best and is installed;
    `more` are options of its own. Raises UnknownName; Unsupported where there is no such engine."""
    names = [server_named(engine)] if engine else list(SERVERS)
    found = [check_stored(checkpoint, name) for name in names]
    programs = {verdict: _program(checkpoint, verdict) for verdict in found}
    ready = [verdict for verdict, program in programs.items() if program]
    if not ready:
        raise Unsupported("; ".join(map(_lacking, found)))
    best = min(ready, key=lambda verdict: _rank(checkpoint, verdict))
    words, variables = _options(SERVERS[best.engine], asked)
    return Command(best.engine, (*programs[best], *words, *more), variables, asked.key, _notes(checkpoint, best))


def _notes(checkpoint: Checkpoint, verdict: Verdict) -> tuple[str, ...]:
    """What is to be known of the checkpoint there."""
    cache = f"its KV cache: {served(checkpoint.kv.grid)}" if checkpoint.kv else None
    return (*verdict.notes, *([cache] if cache else []))


def check_stored(checkpoint: Checkpoint, engine: str) -> Verdict:
    """Whether an engine loads a checkpoint as it lies there; of one that is not quantized, whether it knows the
    model."""
    container = checkpoint.container or _form(checkpoint)
    if container is None and ENGINES[engine].default in FORMS:
        reasons = (f"{engine} does not read safetensors: {ENGINES[engine].otherwise}",)
        return Verdict(engine, Word.REFUSED, "", reasons, (), (), None)
    stored = {w: checkpoint.quantized.get(w.name, (None,))[0] for w in checkpoint.weights()} if container else {}
    return check(engine, container or ENGINES[engine].default, stored, checkpoint.config)


def _form(checkpoint: Checkpoint) -> str | None:
    """The form of output that the checkpoint's files are, where that is no folder of safetensors."""
    suffix = source_suffix(checkpoint.path)
    return next((name for name, form in FORMS.items() if suffix and form.suffix == suffix), None)


def place(checkpoint: Checkpoint) -> Path:
    """What an engine is given: the folder, or the first of the files that are the model."""
    if not _form(checkpoint):
        return checkpoint.path
    return min(entry.path for entry in checkpoint.entries.values())


def _rank(checkpoint: Checkpoint, verdict: Verdict) -> tuple[bool, bool]:
    """What is tested before what was read, then an engine that loads such a file best; of equals the first."""
    return verdict.word is not Word.TESTED, ENGINES[verdict.engine].default != checkpoint.container


def _program(checkpoint: Checkpoint, verdict: Verdict) -> tuple[str, ...]:
    """The words that start the engine with the checkpoint; none where it is not installed, or needs more than that."""
    line = verdict.command or ""
    if not verdict.loads or ORIGINAL in line:
        return ()
    words = [str(place(checkpoint)) if word == "{path}" else word for word in shlex.split(line)]
    if words[:2] != ["python", "-m"]:
        return tuple(words) if shutil.which(words[0]) else ()
    if find_spec(words[2].partition(".")[0]):
        return (sys.executable, *words[1:])
    script = SERVERS[verdict.engine].script
    return (*script, *words[3:]) if script and shutil.which(script[0]) else ()


def _lacking(verdict: Verdict) -> str:
    """Why an engine is not handed over to."""
    if not verdict.loads:
        return verdict.reasons[0]
    if ORIGINAL in (verdict.command or ""):
        return f"{verdict.engine} needs the original too: {verdict.command}"
    return f"{verdict.engine} is not installed"


def _options(server: ServerOptions, asked: Listening) -> tuple[list[str], dict[str, str]]:
    """Those of an engine, and its variables."""
    words, variables = ["--host", asked.host, "--port", str(asked.port)], {}
    if asked.name:
        words += [server.name, asked.name]
    if asked.context:
        words += [server.context, str(asked.context * ((asked.slots or 1) if server.shared_context else 1))]
    if asked.slots:
        words += [server.slots, str(asked.slots)]
    if asked.key and server.key.startswith("--"):
        words += [server.key, asked.key]
    elif asked.key:
        variables[server.key] = asked.key
    return words, variables
