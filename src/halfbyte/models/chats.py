"""Chats to text, by the chat template that came with a model.

A template is a stranger's program: Jinja's sandbox bounds what it may reach, but not how long it runs nor how much
memory it takes. So it runs in a process of its own, which is ended when it takes too much of either.
"""

import json
import os
import subprocess
import sys
import tempfile
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
    request = {
        "template": template_of(tokenizer),
        "variables": dict(tokenizer.special_tokens_map),
        "chats": chats,
        "tools": tools or [None] * len(chats),
        "to_answer": to_answer,
    }
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # A file, as of what a pipe does not take at once Python forgets the rest when it has waited for a while.
    with tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(request, default=str).encode())
        asked.seek(0)
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings
        ) as child:
            try:
                out, err = _watched(child, SECONDS + SECONDS_PER_CHAT * len(chats))
            finally:
                child.kill()
    if child.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        raise BadCheckpoint(f"the model's chat template ends in an error: {lines[-1] if lines else child.returncode}")
    response = json.loads(out)
    return Rendered(
        response["texts"], [(number, " ".join(reason.split())[:200]) for number, reason in response["refused"]]
    )


def _watched(child: subprocess.Popen, seconds: float) -> tuple[bytes, bytes]:
    """What the process answers."""
    process = psutil.Process(child.pid)
    while True:
        try:
            return child.communicate(timeout=LOOK)
        except subprocess.TimeoutExpired:
            taken, used = _taken(process)
        if used > MEMORY:
            raise BadCheckpoint(f"the model's chat template takes more than {MEMORY / 1e9:.1f} GB of memory; {INSTEAD}")
        if taken > seconds:
            raise BadCheckpoint(f"the model's chat template does not end within {seconds:.0f} s; {INSTEAD}")


INSTEAD = "give records with 'text', or a .txt, which need no template"


def _taken(process: psutil.Process) -> tuple[float, int]:
    """Seconds of processor time, and bytes."""
    try:
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0.0, 0
