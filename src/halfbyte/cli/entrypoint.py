"""How the program begins, and all the ways in which it ends."""

import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

import halfbyte
from halfbyte.cli import measuring, planning, reporting, serving, talking, writing
from halfbyte.cli.output import err
from halfbyte.endings import Stop, end_at_once, hang_up, is_want_of_memory, speak_any_language
from halfbyte.errors import HalfbyteError, brief
from halfbyte.surroundings import arrange

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
COMMANDS = {
    "quantize": writing.quantize,
    "convert": writing.convert,
    "dequantize": writing.dequantize,
    "kv": writing.kv,
    "imatrix": writing.imatrix,
    "chat": talking.chat,
    "run": talking.run,
    "serve": serving.serve,
    "eval": measuring.evaluate,
    "needle": measuring.needle,
    "blame": measuring.blame,
    "bench": measuring.bench,
    "compare": reporting.compare,
    "inspect": reporting.inspect,
    "report": reporting.report,
    "push": reporting.push,
    "demo": measuring.demo,
    "plan": planning.plan,
    "devices": planning.devices,
    "support": planning.support,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
INTERRUPTED, BUG = 130, 70
UsageError: Any = typer.BadParameter.__mro__[1]  # of click, which some versions of typer bear within themselves


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _print_version(asked), is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Make large language models small enough to run."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"halfbyte {halfbyte.__version__}")
        raise typer.Exit


def main(words: Sequence[str] | None = None) -> None:
    """Entry point. A request that cannot be met is one line and exit code 2; an interrupted run says how to go on; a
    bug of ours is one line and exit code 70, unless HALFBYTE_DEBUG is set and it is a traceback."""
    started = time.monotonic()
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    arrange()
    end_at_once()
    stop = Stop()
    speak_any_language()
    try:
        code = app(args=words, prog_name="halfbyte", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # typer swallows it and returns this number
        if code:
            sys.exit(code)
    except HalfbyteError as error:
        _refuse(str(error))
    except UsageError as error:
        context = getattr(error, "ctx", None)
        _refuse(f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'halfbyte'} --help")
    except (KeyboardInterrupt, typer.Abort):
        goes_on = (
            "; the same command goes on where it stopped" if words[0] in ("quantize", "convert", "dequantize") else ""
        )
        with suppress(OSError):  # the terminal may be gone
            err.print(f"\nhalfbyte: {stop.message} after {time.monotonic() - started:.0f} s{goes_on}", soft_wrap=True)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        hang_up()  # whoever read our output has seen enough
        sys.exit(1)
    except OSError as error:
        if stop.came:  # with the terminal
            hang_up()
            sys.exit(stop.exit_code)
        _refuse(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        if os.environ.get("HALFBYTE_DEBUG"):
            raise
        if is_want_of_memory(error):
            _refuse(
                f"there is too little memory ({brief(error)}); close other programs or raise the limit, and give "
                "the same command again"
            )
        _admit(error)


def _admit(error: Exception) -> NoReturn:
    """The last net: what no check foresaw is a fault of ours, and what is known of it goes into a file."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="halfbyte-", suffix=".txt", delete=False
    ) as file:
        file.write(f"halfbyte {halfbyte.__version__}, {' '.join(map(shlex.quote, sys.argv[1:]))}\n\n")
        file.writelines(traceback.format_exception(error))
    err.print(
        f"halfbyte: this is a bug of halfbyte ({brief(error)}); please report it with {file.name}, which says where it "
        "happened",
        highlight=False,
        soft_wrap=True,
    )
    sys.exit(BUG)


def _refuse(reason: str) -> NoReturn:
    err.print("halfbyte: " + " ".join(reason.split()), highlight=False, soft_wrap=True)
    sys.exit(2)
