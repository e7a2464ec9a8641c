"""Chats to text, by the chat template that came with a model.

A template is a stranger's program: Jinja's sandbox bounds what it may reach, but not how long it runs nor how much
memory it takes. So it runs in a process of its own, which is ended when it takes too much of either.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from halfbyte.errors import BadCheckpoint

SECONDS, SECONDS_PER_CHAT = 4.0, 0.005
"""Of processor time, of which the start takes one."""
MEMORY = 0.8e9
"""Bytes, of which the start takes a tenth; what it takes until the next look comes on top."""
LOOK = 0.02
"""Seconds between two looks at what the process takes."""


class Rendered(NamedTuple):
    """Chats as texts, and which the template refused."""

    texts: list[str | None]
    """None: the template does not take this chat."""
    refused: list[tuple[int, str]]
    """Which chats, and why."""


def template_of(tokenizer: Any) -> str | None:
    """The chat template that engines use, if there is one."""
    template = tokenizer.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or None


def render(
    tokenizer: Any,
    chats: list[list[dict[str, Any]]],
    tools: list[list[dict[str, Any]] | None] | None = None,
    to_answer: bool = False,
) -> Rendered:
    """What the model would read of each chat, with the tools that it may call there; `to_answer`: up to where its own
    answer begins. Raises BadCheckpoint for a template that never ends, or takes more memory than any should."""
    with Renderer(tokenizer) as renderer:
        return renderer.render(chats, tools, to_answer)


class Renderer:
    """The same time after time, by a process that stays: to start one takes half a second."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._child: subprocess.Popen | None = None
        self._worker = ThreadPoolExecutor(1)

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown()
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def render(
        self,
        chats: list[list[dict[str, Any]]],
        tools: list[list[dict[str, Any]] | None] | None = None,
        to_answer: bool = False,
    ) -> Rendered:
        """As the function. After an error, the next process is another."""
        request = {
            "template": template_of(self._tokenizer),
            "variables": dict(self._tokenizer.special_tokens_map),
            "chats": chats,
            "tools": tools or [None] * len(chats),
            "to_answer": to_answer,
        }
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = _started()
                weakref.finalize(self, self._child.kill)
            child, self._child = self._child, None
            answer = self._worker.submit(_exchanged, child, json.dumps(request, default=str).encode())
            try:
                out = _watched(child, answer, SECONDS + SECONDS_PER_CHAT * len(chats))
            except BaseException:
                child.kill()
                raise
            if not out:
                raise BadCheckpoint(f"the model's chat template ends in an error: {_last_words(child)}")
            self._child = child
        response = json.loads(out)
        return Rendered(
            response["texts"], [(number, " ".join(reason.split())[:200]) for number, reason in response["refused"]]
        )


def _started() -> subprocess.Popen:
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    return subprocess.Popen(  # in a session of its own: Ctrl-C is not meant for it
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=surroundings, start_new_session=True
    )


def _exchanged(child: subprocess.Popen, request: bytes) -> bytes:
    """The line with which the process answers; nothing from one that has ended."""
    if child.stdin is None or child.stdout is None:
        return b""
    with suppress(BrokenPipeError):
        child.stdin.write(request + b"\n")
        child.stdin.flush()
    return child.stdout.readline()


def _last_words(child: subprocess.Popen) -> str:
    """What a process that has ended said of it."""
    lines = child.communicate()[1].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else str(child.returncode)


def _watched(child: subprocess.Popen, answer: Future[bytes], seconds: float) -> bytes:
    """What the process answers. Raises BadCheckpoint for one that takes more than it should."""
    process = psutil.Process(child.pid)
    began, _ = _taken(process)
    while True:
        try:
            return answer.result(LOOK)
        except TimeoutError:
            taken, used = _taken(process)
        if used > MEMORY:
            raise BadCheckpoint(f"the model's chat template takes more than {MEMORY / 1e9:.1f} GB of memory; {INSTEAD}")
        if taken - began > seconds:
            raise BadCheckpoint(f"the model's chat template does not end within {seconds:.0f} s; {INSTEAD}")


INSTEAD = "give plain text, which needs no template"


def _taken(process: psutil.Process) -> tuple[float, int]:
    """Seconds of processor time, and bytes."""
    try:
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0.0, 0
