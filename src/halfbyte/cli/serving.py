"""The command that serves a model, by an engine or by ourselves."""

import os
import shlex
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte import formats
from halfbyte.arguments import Serving
from halfbyte.cli.options import Device, count, option, require_located
from halfbyte.cli.output import err, out
from halfbyte.cli.talking import EXACT, Activations, Context, Dtype, Model
from halfbyte.devices import AUTO
from halfbyte.engines.engines import OWN_SERVER, SERVERS, server_named
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.inference.server.port import listener
from halfbyte.registry import located
from halfbyte.surroundings import of_the_user
from halfbyte.words import require_multiplied

if TYPE_CHECKING:
    from halfbyte.engines.handover import Command, Listening
    from halfbyte.models.checkpoint import Checkpoint

OWN = ("--queue", "--dtype", "--activations", "--device")
"""What no engine is told."""
SLOTS, QUEUE = 4, 128
"""Answers of our own server that take turns, and requests that wait there, where nobody says how many."""


def serve(
    model: Model,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Options that the engine alone has.")
    ] = None,
    engine: Annotated[str | None, option(Serving, "engine", values=(*SERVERS, OWN_SERVER))] = None,
    host: Annotated[str, option(Serving, "host")] = "127.0.0.1",
    port: Annotated[int, count(Serving, "port", max=65535)] = 8000,
    api_key: Annotated[str | None, option(Serving, "api_key", envvar="HALFBYTE_API_KEY")] = None,
    name: Annotated[str | None, option(Serving, "name")] = None,
    context: Context = None,
    slots: Annotated[int | None, count(Serving, "slots", show_default=f"the engine's; {SLOTS} of halfbyte")] = None,
    queue: Annotated[int | None, count(Serving, "queue", show_default=str(QUEUE))] = None,
    dtype: Dtype = None,
    activations: Activations = EXACT,
    device: Device = AUTO,
    dry_run: Annotated[bool, option(Serving, "dry_run", "--dry-run", "--print")] = False,
) -> None:
    """Serve a model over HTTP, by OpenAI's protocol: by the engine that loads it best and is installed, or by halfbyte
    itself.

    halfbyte serve model-int4 --port 8000

    halfbyte serve model-Q4_K_M.gguf --engine halfbyte --slots 8
    """
    engine = engine and server_named(engine)
    if api_key == "":
        raise BadRequest("--api-key is empty; leave it out where no key is to be asked for")
    require_located(model)
    place = listener(host, port)
    from halfbyte.engines.handover import Listening
    from halfbyte.models import calibrate
    from halfbyte.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    calibrate.tokenizer_of(checkpoint)
    asked = Listening(host, place.getsockname()[1], api_key, name or _name(model), context, slots)
    said = {"--name": name, "--context": context, "--slots": slots, "--queue": queue, "--dtype": dtype}
    words = [word for option, value in said.items() if value is not None for word in (option, str(value))]
    words += ["--activations", activations] if activations != EXACT else []
    words += ["--device", device] if device != AUTO else []
    if command := _command(checkpoint, asked, engine, more or [], words):
        place.close()
        _become(command, dry_run)
    elif more:
        raise BadRequest(f"{OWN_SERVER}'s own server has no {shlex.join(more)}; leave it out")
    elif dry_run:
        begin = ["halfbyte", "serve", model, "--engine", OWN_SERVER, "--host", host, "--port", str(port)]
        out.print(shlex.join([*begin, *words]), highlight=False, soft_wrap=True)
    else:
        _serve(model, asked, place, QUEUE if queue is None else queue, dtype, require_multiplied(activations), device)


def _name(model: str) -> str:
    """What clients call the model."""
    path = located(model)
    if path is None:
        return model
    return path.resolve().name if path.is_dir() else path.stem


def _command(
    checkpoint: "Checkpoint", asked: "Listening", engine: str | None, more: list[str], given: list[str]
) -> "Command | None":
    """What starts an engine; None where it is to be our own server."""
    from halfbyte.engines.handover import handover

    if engine == OWN_SERVER:
        return None
    try:
        command = handover(checkpoint, asked, engine, more)
    except Unsupported as reason:
        if engine is not None:
            raise Unsupported(f"{reason}; --engine {OWN_SERVER} serves it") from None
        if more:
            raise Unsupported(f"no engine takes {shlex.join(more)}: {reason}") from None
        err.print(f"{OWN_SERVER} serves it itself: {reason}", highlight=False, soft_wrap=True)
        return None
    if alone := next((word for word in given if word in OWN), None):
        raise BadRequest(
            f"{command.engine} is to serve it, which has no {alone}; options of its own go behind --, and --engine "
            f"{OWN_SERVER} has {alone}"
        )
    return command


def _become(command: "Command", dry_run: bool) -> None:
    """Print the command, and run it in place of this program: signals reach it."""
    out.print(command.line, highlight=False, soft_wrap=True)
    for note in command.notes:
        err.print(f"note: {note}", highlight=False, soft_wrap=True)
    if not dry_run:
        sys.stdout.flush()
        os.execvpe(command.words[0], command.words, {**of_the_user(), **command.variables})


def _serve(
    model: str,
    asked: "Listening",
    place: socket.socket,
    queue: int,
    dtype: str | None,
    activations: formats.Activations,
    device: str,
) -> None:
    """By our own server, until a signal comes."""
    try:
        from halfbyte.inference.server.listen import Server, Serving
    except ModuleNotFoundError as missing:
        raise BadRequest(
            f"halfbyte's own server needs {missing.name}, which is not installed: pip install 'halfbyte[serve]'"
        ) from None
    from halfbyte.inference.model import Answering

    def log(line: str) -> None:
        err.print(line, highlight=False, soft_wrap=True)

    slots = asked.slots or SLOTS
    answering = Answering.open(model, device, dtype, asked.context, activations=activations, sequences=slots)
    for warning in answering.warnings:
        log(f"note: {warning}")
    Server(answering, Serving(asked.name or model, log, asked.key, slots, queue)).answer(place)
    log("halfbyte: ended")
