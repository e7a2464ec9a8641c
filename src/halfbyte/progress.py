"""How far long work is: what a caller is told, and a bar on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from time import monotonic

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


class Stage:
    """A stretch of work that counts up to one total, and the pace that it goes at."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._total, self._first, self._done, self._began = 0.0, 0.0, 0.0, 0.0

    def left(self, done: float, total: float) -> float | None:
        """Seconds until all is done, at the pace of what is; None until some is."""
        now = self._clock()
        if total != self._total or done < self._done:
            self._total, self._first, self._began = total, done, now
        self._done = done
        return (now - self._began) / (done - self._first) * (total - done) if done > self._first else None


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from halfbyte.terminal import Terminal, duration, plain

    console = Terminal(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, stage = bar.add_task("", total=None, left=""), Stage()

        def show(what: str, done: float, total: float) -> None:
            if what.startswith((RESUMING, TAKING)) and console.is_terminal:
                console.print(what, highlight=False, soft_wrap=True)
            left = stage.left(done, total)
            remaining = "" if left is None else f"about {duration(left)} left"
            bar.update(task, description=plain(what), completed=done, total=total, left=remaining)

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
