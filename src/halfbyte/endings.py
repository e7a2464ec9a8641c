"""How a run ends: by itself, or from outside by a signal, or for want of memory."""

import atexit
import gc
import os
import signal
import sys
import threading
from io import TextIOWrapper
from types import FrameType

SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")
"""Those that mean what Ctrl-C means: batch systems and containers send the first, a terminal that is closed the second,
Windows' the third."""

WANT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "not enough memory",
    "out of memory",
)
"""What torch, Python's threads and the system's loader say then, in errors of other kinds."""


class Stop:
    """Makes of these signals what Ctrl-C is to Python, once: while a run is tidying up, more of them are ignored. One
    that was ignored stays so (nohup)."""

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            return
        self.watched = [
            number
            for name in SIGNALS
            if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) != signal.SIG_IGN
        ]
        for number in self.watched:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        for other in self.watched:
            signal.signal(other, signal.SIG_IGN)
        self.number = number
        raise KeyboardInterrupt

    @property
    def came(self) -> bool:
        """Whether one of them has ended the run."""
        return self.number != signal.SIGINT

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return 128 + self.number

    @property
    def message(self) -> str:
        """What happened, for the user."""
        return f"interrupted by {signal.Signals(self.number).name}" if self.came else "interrupted"


def end_at_once() -> None:
    """Python looks through every object once more as it ends, for those that refer to each other: with torch loaded
    that took a quarter of a short run's processor time, and the system takes all of them anyway."""
    atexit.register(gc.freeze)


def speak_any_language() -> None:
    """Characters that the terminal's encoding has not are replaced, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def hang_up() -> None:
    """Nobody reads what we say: what Python still holds for them goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            os.dup2(nowhere, stream.fileno())


def is_want_of_memory(error: BaseException) -> bool:
    """Whether there is too little memory, and no fault in what was asked."""
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in WANT_OF_MEMORY)
