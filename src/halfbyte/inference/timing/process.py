"""An engine in a process of its own, as who started it sees it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from halfbyte.errors import Unsupported, brief
from halfbyte.inference.timing import worker


class EngineFailed(Unsupported):
    """An engine does not load a model, or ended while it ran it."""

    def __init__(self, reason: str, signal_name: str | None = None):
        super().__init__(reason)
        self.signal_name = signal_name
        """What killed it."""


@contextmanager
def started(home: str, is_ours: bool, threads: int, environment: Mapping[str, str]) -> Iterator["EngineProcess"]:
    """A process for as long as this lasts. `home`: the engine's class, as `module:Class`."""
    command = [sys.executable, "-P", "-m", worker.__name__, home, worker.OURS if is_ours else "theirs"]
    surroundings = {
        **environment,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # in a session of its own: Ctrl-C is not meant for it
            command, stdin=pipe, stdout=pipe, stderr=errors, env=surroundings, start_new_session=True
        )
        try:
            yield EngineProcess(process, errors)
        finally:
            process.kill()
            process.communicate()


class EngineProcess:
    """One engine, one model: what is called here runs there."""

    def __init__(self, process: subprocess.Popen, errors: IO[bytes]):
        self._process, self._errors = process, errors
        self.memory_bytes: int | None = None
        """The most that it has had until its last answer."""

    def call(self, method: str, **arguments: Any) -> Any:
        """Raises EngineFailed, with the last words of a process that ended."""
        line = self._exchanged(json.dumps({"method": method, **arguments}).encode())
        if not line:
            raise self._failure()
        answer = json.loads(line)
        if "refused" in answer:
            raise EngineFailed(answer["refused"])
        self.memory_bytes = answer["memory_bytes"]
        return answer["answer"]

    def _exchanged(self, request: bytes) -> bytes:
        """The line with which the process answers; nothing from one that has ended."""
        if self._process.stdin is None or self._process.stdout is None:
            return b""
        with suppress(BrokenPipeError):
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _failure(self) -> EngineFailed:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            return EngineFailed(f"it was ended by {name}", name)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return EngineFailed(f"it ended with {brief(lines[-1].strip()) if lines else f'exit code {code}'}")
