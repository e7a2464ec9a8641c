"""How far long work is: what a caller is told, and a bar on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from halfbyte.errors import BadRequest

Progress = Callable[[str, float, float], None]
"""(what is being done, done so far, of how much)"""
RESUMING = "resuming"
TAKING = "this takes"
"""How messages begin that are worth a line of their own."""


def silent(what: str, done: float, total: float) -> None:
    """No progress shown."""


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress]:
    """What is to be called: the function itself, a bar on standard error for True (one that nobody looks at is not
    drawn), nothing for False."""
    if progress is True:
        with _bar() as show:
            yield show
    elif progress is False:
        yield silent
    elif callable(progress):
        yield progress
    else:
        raise BadRequest(f"progress is True, False, or a function of (what, done, total), not {progress!r}")


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from halfbyte.terminal import Terminal, plain

    console = Terminal(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: float, total: float) -> None:
            if what.startswith((RESUMING, TAKING)) and console.is_terminal:
                console.print(what, highlight=False, soft_wrap=True)
            bar.update(task, description=plain(what), completed=done, total=total)

        with (
            told_of_kernels(lambda: bar.update(task, description="compiling kernels, once"))
            if console.is_terminal
            else nullcontext()
        ):
            yield show


@contextmanager
def told_of_kernels(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` whenever a kernel has to be compiled, which takes seconds."""
    from numba.core.event import Event, Listener, install_listener

    class Told(Listener):
        def on_start(self, event: Event) -> None:
            tell()

        def on_end(self, event: Event) -> None:
            pass

    with install_listener("numba:compile", Told()):
        yield
